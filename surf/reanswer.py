"""Answers to the rounds of one part that are asked again, once with each reference alone, in order of similarity.

    python -m surf.reanswer --rounds … --scores … --neighbors … --catalog … --out … --quarantine … FLAGS

Those are the wrongly answered rounds, and `reanswer.right_share` of the rightly answered ones: there a reference is negative
that makes the answer wrong. With `reanswer.stop_early` a round is left as soon as one positive and one negative reference are
found: `pair` takes the most similar of each kind, which are then the first of each kind, so leaving early changes no pair.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa

from surf import cli, config, prompts, quarantine, score, store, workers
from surf.answer import respond, unreadable
from surf.images import Images
from surf.models import Responder, load_responder
from surf.shards import stable_hash
from surf.telemetry import Clock

Row = dict[str, Any]


def reanswer(
    again: Sequence[Row],
    references: Mapping[str, Sequence[tuple[int, prompts.Reference]]],
    responder: Responder,
    images: Images,
    judge: "Judge",
    partial: store.Partial,
    *,
    lvlm: config.Lvlm,
    answer: config.Answer,
    options: config.Reanswer,
    seed: int,
) -> tuple[pa.Table, dict[str, str]]:
    """Responses to every round with its references.

    Args:
        again: rows of `rounds`, each with its first answer's score under "base", and whether that was "right".
        references: image name to its (image id, reference) list, most similar first.

    Returns:
        (table with the columns of `reanswers`, in the order of `again` and rank; {"round_id#rank": error})
    """
    own = {row["round_id"] for row in again}
    saved = (row for row in store.rows(partial.read()) if row["round_id"] in own)
    done = {(row["round_id"], row["rank"]): row for row in saved}
    errors: dict[str, str] = {}

    def turn(active: Sequence[_Round]) -> None:
        """Ask each round about its next reference."""
        asked = [(one.row, one.rank, *references[one.row["image"]][one.rank]) for one in active]
        bad = unreadable(images, (name for row, _, _, ref in asked for name in (ref.image, row["image"])))
        for row, rank, _, ref in asked:
            if error := bad.get(ref.image) or bad.get(row["image"]):
                errors[f"{row['round_id']}#{rank}"] = error
        asked = [one for one in asked if f"{one[0]['round_id']}#{one[1]}" not in errors]
        rows = respond([one for one in asked if (one[0]["round_id"], one[1]) not in done], responder, lvlm, answer, seed)
        partial.save(store.table_of(rows, "reanswers"))
        done.update({(row["round_id"], row["rank"]): row for row in rows})
        answered = [(row, done[row["round_id"], rank]) for row, rank, _, _ in asked]
        labels = judge.labels(answered) if options.stop_early else []
        found = {row["round_id"]: label for (row, _), label in zip(answered, labels, strict=False)}
        for one in active:
            one.rank += 1
            one.kinds.add(found.get(one.row["round_id"]))

    def left(one: _Round) -> bool:
        limit = min(options.references, len(references.get(one.row["image"], ())))
        return one.rank < limit and not (options.stop_early and {True, False} <= one.kinds)

    for _ in workers.lanes(_turns(again, left, answer.flush_rows), turn):
        pass
    return in_order(done.values(), again), errors


@dataclass
class _Round:
    row: Row
    rank: int = 0  # of the next reference
    kinds: set[bool | None] = field(default_factory=set)  # of references found so far


def _turns(again: Sequence[Row], left: Callable[[_Round], bool], size: int) -> Iterator[list[_Round]]:
    """Rounds of one turn after the other, about `size` of them (fewer at first), until none has anything `left`.

    Rounds that are done make room for the next ones, so that turns stay full. There are two lots, which take turns by turns:
    `workers.lanes` has two slices at work, and a lot's next turn must wait for its last one.
    """
    coming = cli.chunks(again, size, desc="reanswer", unit="round")
    lots: list[list[_Round]] = [[], []]
    for number in count():
        lot = [one for one in lots[number % 2] if left(one)]
        while len(lot) <= size // 2 and (more := next(coming, None)):
            lot += [one for one in map(_Round, more) if left(one)]
            if lot:  # one slice a turn: the time until the next one is asked for tells how long that may be
                break
        lots[number % 2] = lot
        if not any(lots):
            return
        cli.stop_if_asked()  # a full lot asks `coming` for nothing
        yield lot


def in_order(done: Iterable[Row], again: Sequence[Row]) -> pa.Table:
    """Those of the finished rows that answer one of the rounds `again`, in their order and that of the ranks."""
    place = {row["round_id"]: number for number, row in enumerate(again)}
    own = [row for row in done if row["round_id"] in place]
    return store.table_of(sorted(own, key=lambda row: (place[row["round_id"]], row["rank"])), "reanswers")


class Judge:
    """Labels references by the words of the judge that `score` uses later; loads BERTScore's encoder once."""

    def __init__(self, options: config.Score) -> None:
        self.options = options
        self.scorer = score.scorer(options)
        self.lock = threading.Lock()  # its encoder is loaded once, whichever lane asks first

    def labels(self, answered: Sequence[tuple[Row, Row]]) -> list[bool | None]:
        """For (round, response) rows: True positive, False negative, None undecided."""
        if not answered:
            return []
        with self.lock:
            verdicts = score.judge(
                [row["task"] for row, _ in answered],
                [response["response"] for _, response in answered],
                [row["answer"] for row, _ in answered],
                self.options,
                self.scorer,
                [response["gold_loglik"] for _, response in answered],
            )
        return [
            score.label(metric, value, correct, row["base"], row["right"], self.options)
            for (row, _), (metric, value, correct) in zip(answered, verdicts, strict=True)
        ]


def asked_again(rounds: Path, scores: Path, right_share: float, seed: int) -> list[Row]:
    """Rounds whose first answer is wrong, and a share of those where it is right, in the order of `rounds`.

    Undecided ones are neither. Each has its first answer's score under "base", and whether that was "right".
    """
    first = {row["round_id"]: row for row in store.rows(store.read_table(scores, "scores/answers"))}
    again = []
    for row in store.rows(store.read_table(rounds, "rounds")):
        judged = first.get(row["round_id"])
        if judged is None or judged["correct"] is None:
            continue
        drawn = stable_hash(seed, "right", row["round_id"]) % 10**6 < right_share * 10**6
        if drawn or not judged["correct"]:
            again.append({**row, "base": judged["score"], "right": judged["correct"]})
    return again


def references_of(neighbors: Path, catalog: Path, limit: int) -> dict[str, list[tuple[int, prompts.Reference]]]:
    """Image name to its (image id, reference) list, most similar first."""
    ranked: dict[str, list[tuple[int, int]]] = {}
    for row in store.rows(store.read_table(neighbors, "neighbors")):
        if row["rank"] < limit:
            ranked.setdefault(row["query_id"], []).append((row["rank"], row["image_id"]))
    pairs = lookup(catalog, {image_id for ranks in ranked.values() for _, image_id in ranks})
    return {name: [(image_id, pairs[image_id]) for _, image_id in sorted(ranks)] for name, ranks in ranked.items()}


def lookup(catalog: Path, image_ids: set[int]) -> dict[int, prompts.Reference]:
    """Images and captions of the given rows of the catalog, read part by part."""
    wanted = pa.array(sorted(image_ids), pa.int64())
    found = {}
    for part in store.parts_of(catalog, "catalog"):
        table = store.read_table(part, "catalog")
        for row in store.rows(table.filter(pa.compute.is_in(table["image_id"], value_set=wanted))):
            found[row["image_id"]] = prompts.Reference(row["image"], row["caption"])
    return found


def main() -> None:
    """Command line."""
    args = cli.parse(
        None,
        prog="reanswer",
        about=__doc__ or "",
        sections=["lvlm", "answer", "reanswer", "score", "images"],
        paths=["rounds", "scores", "neighbors", "catalog", "out", "quarantine"],
        extras={"seed": {"type": int, "default": 0}},
    )
    clock = Clock()
    again = asked_again(args.rounds, args.scores, args.reanswer.right_share, args.seed)
    references = references_of(args.neighbors, args.catalog, args.reanswer.references)
    flags = cli.flags(lvlm=args.lvlm, answer=args.answer, reanswer=args.reanswer, score=args.score)
    version = f"{args.reanswer.version}.{args.answer.version}"
    inputs = [store.footer(path)[1]["digest"] for path in (args.rounds, args.scores, args.neighbors)]
    partial = store.Partial(
        args.out,
        "reanswers",
        flags=flags,
        version=version,
        seed=args.seed,
        inputs=inputs,
        catalog=store.read_json(args.catalog),
    )
    if crew := workers.wanted():
        (found,), errors = workers.lead(crew, [partial], None, desc="reanswer", unit="response")
        table = in_order(store.rows(found), again)
    else:
        images = Images(args.images.roots, args.images.max_pixels, cached=1024)
        responder = load_responder(args.lvlm, images)
        clock.loaded()
        table, errors = reanswer(
            workers.mine(again, lambda row: row["image"]),
            references,
            responder,
            images,
            Judge(args.score),
            partial,
            lvlm=args.lvlm,
            answer=args.answer,
            options=args.reanswer,
            seed=args.seed,
        )
        if workers.report(errors, table.num_rows):
            return
    quarantine.settle(
        args.quarantine,
        errors,
        dataset="reanswers",
        stage="reanswer",
        total=table.num_rows + len(errors),
        max_bad_share=args.images.max_bad_share,
    )
    meta = {"stage": "reanswer", "version": version, "flags": flags}
    store.write_table(args.out, table, "reanswers", meta)
    clock.note(args.out, table.num_rows, workers=crew)


if __name__ == "__main__":
    cli.run(main)
