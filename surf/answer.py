"""First answers of the frozen model to one part of `rounds`, without references.

    python -m surf.answer --rounds results/rounds/part-….parquet --out results/answers/part-….parquet --quarantine … FLAGS

Finished rows are saved every `answer.flush_rows` rows; a killed job goes on from there.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from surf import cli, config, prompts, quarantine, store, workers
from surf.errors import ImageError
from surf.images import Images
from surf.models import Responder, features, load_responder, request
from surf.shards import stable_hash
from surf.telemetry import Clock

# (row of `rounds`, rank of the reference, its image id, the reference); −1, None, None without one
Asked = tuple[dict[str, Any], int, int | None, prompts.Reference | None]


CHARS = 4  # of a token of English text


def answer(
    rounds: pa.Table,
    responder: Responder,
    images: Images,
    partial: store.Partial,
    *,
    lvlm: config.Lvlm,
    options: config.Answer,
    seed: int,
) -> tuple[pa.Table, dict[str, str]]:
    """One response to every round whose image can be opened.

    Returns:
        (table with the columns of `answers`, rank −1, in the order of `rounds`; {round_id: error})
    """
    done = store.rows(partial.read())
    finished = {row["round_id"] for row in done}
    todo = [row for row in store.rows(rounds) if row["round_id"] not in finished]
    errors: dict[str, str] = {}

    def work(chunk: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        bad = unreadable(images, (row["image"] for row in chunk))
        errors.update({row["round_id"]: bad[row["image"]] for row in chunk if row["image"] in bad})
        asked: list[Asked] = [(row, -1, None, None) for row in chunk if row["image"] not in bad]
        fresh = respond(asked, responder, lvlm, options, seed)
        partial.save(store.table_of(fresh, "answers"))
        return fresh

    for fresh in workers.lanes(cli.chunks(todo, options.flush_rows, desc="answer", unit="round"), work):
        done += fresh
    return in_order(done, rounds), errors


def in_order(done: Iterable[dict[str, Any]], rounds: pa.Table) -> pa.Table:
    """Those of the finished rows that answer one of `rounds`, in their order."""
    place = {round_id: number for number, round_id in enumerate(rounds["round_id"].to_pylist())}
    own = [row for row in done if row["round_id"] in place]
    return store.table_of(sorted(own, key=lambda row: place[row["round_id"]]), "answers")


def respond(
    asked: Sequence[Asked], responder: Responder, lvlm: config.Lvlm, options: config.Answer, seed: int
) -> list[dict[str, Any]]:
    """Rows of `answers` or `reanswers`: one response to each question, each with a seed of its own."""
    requests = [
        request(
            row["question"],
            row["image"],
            [reference] if reference else [],
            lvlm,
            seed=stable_hash(seed, row["round_id"], rank),
            guess=2 + len(row["answer"]) // CHARS,  # the model will answer at about the length of the true answer
        )
        for row, rank, _, reference in asked
    ]
    texts = responder.respond(requests, max_new_tokens=options.max_new_tokens, temperature=options.temperature)
    golds: list[float | None] = [None] * len(asked)
    if options.gold_loglik:
        golds = list(responder.loglik(requests, [row["answer"] for row, *_ in asked]))
    return [
        {"round_id": row["round_id"], "rank": rank, "image_id": image_id, "response": text, "gold_loglik": gold}
        for (row, rank, image_id, _), text, gold in zip(asked, texts, golds, strict=True)
    ]


def unreadable(images: Images, names: Iterable[str]) -> dict[str, str]:
    """Which of the images cannot be opened, and why."""

    def look(name: str) -> str:
        try:
            images.open(name)
        except ImageError as error:
            return str(error)
        return ""

    different = list(dict.fromkeys(names))
    with features.pool() as threads:
        return {name: error for name, error in zip(different, threads.map(look, different), strict=True) if error}


def main() -> None:
    """Command line."""
    args = cli.parse(
        None,
        prog="answer",
        about=__doc__ or "",
        sections=["lvlm", "answer", "images"],
        paths=["rounds", "out", "quarantine"],
        extras={"seed": {"type": int, "default": 0}},
    )
    clock = Clock()
    rounds = store.read_table(args.rounds, "rounds")
    flags = cli.flags(lvlm=args.lvlm, answer=args.answer)
    version = args.answer.version
    partial = store.Partial(args.out, "answers", flags=flags, version=version, seed=args.seed, input=store.digest(rounds))
    if count := workers.wanted():
        (found,), errors = workers.lead(count, [partial], rounds.num_rows, desc="answer", unit="round")
        result = in_order(store.rows(found), rounds)
    else:
        images = Images(args.images.roots, args.images.max_pixels, cached=1024)
        responder = load_responder(args.lvlm, images)
        clock.loaded()
        own = store.table_of(workers.mine(store.rows(rounds), lambda row: row["image"]), "rounds")
        result, errors = answer(own, responder, images, partial, lvlm=args.lvlm, options=args.answer, seed=args.seed)
        if workers.report(errors, result.num_rows):
            return
    quarantine.settle(
        args.quarantine,
        errors,
        dataset="answers",
        stage="answer",
        total=rounds.num_rows,
        max_bad_share=args.images.max_bad_share,
    )
    meta = {"stage": "answer", "version": version, "flags": flags}
    store.write_table(args.out, result, "answers", meta)
    clock.note(args.out, rounds.num_rows, workers=count)


if __name__ == "__main__":
    cli.run(main)
