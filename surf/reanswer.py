"""Answers to the wrongly answered rounds of one part, once with each reference alone, in order of similarity.

    python -m surf.reanswer --rounds … --scores … --neighbors … --catalog … --out … --quarantine … FLAGS

With `reanswer.stop_early` a round is left as soon as one positive and one negative reference are found: `pair` takes the most
similar of each kind, which are then the first of each kind, so leaving early changes no pair.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from surf import cli, config, prompts, quarantine, score, store
from surf.answer import respond, unreadable
from surf.images import Images
from surf.models import Responder
from surf.telemetry import Clock

Row = dict[str, Any]


def reanswer(
    wrong: Sequence[Row],
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
    """Responses to every wrong round with its references.

    Args:
        wrong: rows of `rounds`, each with the score of its first answer under the key "base".
        references: image name to its (image id, reference) list, most similar first.

    Returns:
        (table with the columns of `reanswers`, in the order of `wrong` and rank; {"round_id#rank": error})
    """
    done = {(row["round_id"], row["rank"]): row for row in store.rows(partial.read())}
    errors: dict[str, str] = {}
    for chunk in cli.chunks(wrong, answer.flush_rows, desc="reanswer", unit="round"):
        active = list(chunk)
        kinds: dict[str, set[bool | None]] = {row["round_id"]: set() for row in active}
        for rank in range(options.references):
            active = [row for row in active if rank < len(references.get(row["image"], ()))]
            asked = [(row, rank, *references[row["image"]][rank]) for row in active]
            bad = unreadable(images, (name for row, _, _, ref in asked for name in (ref.image, row["image"])))
            errors.update({f"{row['round_id']}#{rank}": bad[ref.image] for row, _, _, ref in asked if ref.image in bad})
            asked = [one for one in asked if one[3].image not in bad and one[0]["image"] not in bad]
            fresh = [one for one in asked if (one[0]["round_id"], rank) not in done]
            rows = respond(fresh, responder, lvlm, answer, seed)
            partial.save(store.table_of(rows, "reanswers"))
            done.update({(row["round_id"], row["rank"]): row for row in rows})
            if options.stop_early:
                answered = [(row, done[row["round_id"], rank]) for row, _, _, _ in asked]
                for (row, _), kind in zip(answered, judge.labels(answered), strict=True):
                    kinds[row["round_id"]].add(kind)
                active = [row for row in active if not {True, False} <= kinds[row["round_id"]]]
    place = {row["round_id"]: number for number, row in enumerate(wrong)}
    ordered = sorted(done.values(), key=lambda row: (place[row["round_id"]], row["rank"]))
    return store.table_of(ordered, "reanswers"), errors


class Judge:
    """Labels references by the words of the judge that `score` uses later; loads BERTScore's encoder once."""

    def __init__(self, options: config.Score) -> None:
        self.options = options
        self.scorer = score.scorer(options)

    def labels(self, answered: Sequence[tuple[Row, Row]]) -> list[bool | None]:
        """For (round, response) rows: True positive, False negative, None undecided."""
        if not answered:
            return []
        verdicts = score.judge(
            [row["task"] for row, _ in answered],
            [response["response"] for _, response in answered],
            [row["answer"] for row, _ in answered],
            self.options,
            self.scorer,
            [response["gold_loglik"] for _, response in answered],
        )
        return [
            score.label(metric, value, correct, row["base"], self.options)
            for (row, _), (metric, value, correct) in zip(answered, verdicts, strict=True)
        ]


def wrong_rounds(rounds: Path, scores: Path) -> list[Row]:
    """Rounds whose first answer is wrong (not merely undecided), with its score under "base", in the order of `rounds`."""
    first = {row["round_id"]: row for row in store.rows(store.read_table(scores, "scores/answers"))}
    wrong = []
    for row in store.rows(store.read_table(rounds, "rounds")):
        judged = first.get(row["round_id"])
        if judged is not None and judged["correct"] is False:
            wrong.append({**row, "base": judged["score"]})
    return wrong


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
    from surf.models import lvlm

    clock = Clock()
    wrong = wrong_rounds(args.rounds, args.scores)
    references = references_of(args.neighbors, args.catalog, args.reanswer.references)
    images = Images(args.images.roots, args.images.max_pixels, cached=1024)
    responder = lvlm.load(args.lvlm, images)
    clock.loaded()
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
    table, errors = reanswer(
        wrong,
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
    clock.note(args.out, table.num_rows)


if __name__ == "__main__":
    cli.run(main)
