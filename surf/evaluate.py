"""Answer the questions of an evaluation task, with all methods that share a model.

    python -m surf.evaluate questions --task pope --kind pope --files '{"random": "coco_pope_random.json"}' --out QUESTIONS
    python -m surf.evaluate answer --questions QUESTIONS --methods '{"surf": {"model": "tuned", "references": 2}}' \\
        --neighbors PART --catalog MANIFEST --candidates FILE… --model results/model --suffix … --out MANIFEST FLAGS

A model is loaded once, and a prompt that several methods make is asked once. Beside the manifest lies one file a method,
METHOD.parquet; it knows what it was made from and is kept as long as that is so: a new method costs its own answers only.
What the answers are worth is the business of `evidence` and `pope`: they read finished answer files, so that another way of
scoring asks no model again.
"""

import argparse
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pydantic import ValidationError

from surf import cli, config, methods, prompts, references, store, workers
from surf.answer import unreadable
from surf.errors import SurfError
from surf.images import Images
from surf.models import Request, Responder, load_responder, request
from surf.once import Once
from surf.references import Shown
from surf.tasks import KINDS
from surf.telemetry import Clock

log = logging.getLogger("surf")
FLUSH_ROWS = 2048  # questions between two saves of unfinished work
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: the first word says what to do."""
    cli.dispatch({"questions": _questions, "answer": _answer}, argv, prog="evaluate", about=__doc__ or "")


# --- questions --------------------------------------------------------------------------------------------------------


def read(kind: str, files: Mapping[str, str]) -> pa.Table:
    """The questions of all splits as a table of dataset `evaluate/questions`, in the order of the files."""
    rows = [{**row, "split": split} for split, path in files.items() for row in KINDS[kind].read(Path(path), split)]
    return store.table_of(rows, "evaluate/questions")


def _questions(words: Sequence[str]) -> None:
    args = cli.parse(
        words,
        prog="evaluate questions",
        about="Read the question files of one task.",
        paths=["out"],
        extras={
            "task": {"required": True, "help": "name of the task, kept in the file"},
            "kind": {"required": True, "choices": list(KINDS)},
            "files": {"required": True, "type": json.loads, "help": "JSON: the file of each split"},
        },
    )
    table = read(args.kind, args.files)
    sources = {split: _digest(Path(path)) for split, path in args.files.items()}
    meta = {"stage": "evaluate questions", "version": config.Evaluate.version, "task": args.task, "kind": args.kind}
    store.write_table(args.out, table, "evaluate/questions", {**meta, "sources": sources})
    log.info("%d questions on %d images", table.num_rows, len(set(table["image"].to_pylist())))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "a folder"


# --- answer -----------------------------------------------------------------------------------------------------------


def answer(
    questions: Sequence[Row],
    shown: Shown,
    responder: Responder,
    partial: store.Partial,
    *,
    method: methods.Method,
    lvlm: config.Lvlm,
    suffix: str = "",
    max_new_tokens: int = 16,
) -> pa.Table:
    """Greedy answers to all questions. Those on one image are handed to the model together.

    Args:
        questions: rows of `evaluate/questions`.
        shown: the references of each question; one that is not among them is asked without.
        partial: finished rows of an earlier, killed run.

    Returns:
        table with the columns of `evaluate/answers`, in the order of `questions`.
    """
    done = {row["question_id"]: row for row in store.rows(partial.read())}
    todo = sorted((row for row in questions if row["question_id"] not in done), key=lambda row: row["image"])

    def requests(rows: Sequence[Row], bare: bool = False) -> list[Request]:
        pairs = [() if bare else shown.get(row["question_id"], ()) for row in rows]
        said = f"{suffix}\n{method.say}" if method.say else suffix
        texts = [row["question"] + (said if of else suffix) for row, of in zip(rows, pairs, strict=True)]
        return [
            request(text, row["image"], [ref for _, ref in of], lvlm, show=method.show)
            for text, row, of in zip(texts, rows, pairs, strict=True)
        ]

    for chunk in cli.chunks(todo, FLUSH_ROWS, desc="evaluate", unit="question"):
        fresh = [{**row, "references": [image_id for image_id, _ in shown.get(row["question_id"], ())]} for row in chunk]
        unsure = fresh
        if method.gate is not None:
            bare = requests(fresh, bare=True)
            texts = responder.respond(bare, max_new_tokens=max_new_tokens)
            for row, text, value in zip(fresh, texts, responder.loglik(bare, texts), strict=True):
                row.update(response=prompts.split_verdict(text)[0], confidence=math.exp(value) if text else 0.0)
            unsure = [row for row in fresh if row["confidence"] < method.gate]
            for row in fresh:
                row["references"] = row["references"] if row["confidence"] < method.gate else []
        for row, text in zip(unsure, responder.respond(requests(unsure), max_new_tokens=max_new_tokens), strict=True):
            row["response"] = prompts.split_verdict(text)[0]  # of a model trained with finetune.verdict
        partial.save(store.table_of(fresh, "evaluate/answers"))
        done.update((row["question_id"], row) for row in fresh)
    return in_order(done.values(), questions)


def in_order(done: Iterable[Row], questions: Sequence[Row]) -> pa.Table:
    """The finished rows of `questions`, in their order."""
    found = {row["question_id"]: row for row in done}
    return store.table_of([found[row["question_id"]] for row in questions], "evaluate/answers")


def check_images(images: Images, asked: Sequence[str], shown: Sequence[str]) -> None:
    """Open every image before the model is loaded: an evaluation must be complete.

    Raises:
        SurfError: an image of a question, or of one of its references, cannot be opened.
    """
    bad = unreadable(images, [*asked, *shown])
    if bad:
        name, error = next(iter(bad.items()))
        raise SurfError(
            f"{len(bad)} images of the evaluation cannot be opened, the first is {name!r}: {error}",
            where="images.roots",
            expected="every image of the questions and their references",
            next="add the folder that holds it to images.roots in config.yaml",
        )


def _answer(words: Sequence[str]) -> None:
    args = cli.parse(
        words,
        prog="evaluate answer",
        about="Answer the questions of one task with the methods of one model; answers that are there already are kept.",
        sections=["lvlm", "images"],
        paths=["questions", "out"],
        extras={
            "methods": {"required": True, "type": _methods, "help": "JSON: {name: keys of evaluate.methods.NAME}"},
            "neighbors": {"type": Path, "help": "neighbours of the questions' images; needed with retrieved references"},
            "candidates": {"type": Path, "nargs": "*", "default": [], "help": "scores of the candidates, as methods need"},
            "catalog": {"type": Path, "help": "manifest of the catalog; needed with references"},
            "model": {"type": Path, "help": "folder of a tuned model; without it lvlm.model answers"},
            "suffix": {"default": "", "help": "appended to every question"},
            "max_new_tokens": {"type": int, "default": 16, "help": "length limit of an answer"},
            "seed": {"type": int, "default": 0},
        },
    )
    clock = Clock()
    table = store.read_table(args.questions, "evaluate/questions")
    about = store.footer(args.questions)[1]
    rows = store.rows(table)
    images = Images(args.images.roots, args.images.max_pixels, cached=1024)
    files = references.Files(args.neighbors, args.catalog, {path.stem: path for path in args.candidates})
    flags = f"--suffix {args.suffix!r} --max-new-tokens {args.max_new_tokens} {cli.flags(lvlm=args.lvlm)}"
    card = args.model / "model.json" if args.model else None
    same = {  # what all methods' answers depend on
        "flags": flags,
        "version": config.Evaluate.version,
        "questions": store.digest(table),
        "catalog": store.read_json(args.catalog) if args.catalog else None,
        # no folder name says which weights lie in it: model.json does, with data, flags and every step's loss. Not its time: a
        # model.json that is put back, or made again alike, must ask nothing again
        "model": card.read_text() if card and card.exists() else str(args.model),
    }
    jobs: dict[str, _Job] = {}
    for name, method in args.methods.items():
        shown = references.shown(rows, method, files, images, args.seed)
        ids = {key: [image_id for image_id, _ in pairs] for key, pairs in shown.items()}
        how = method.model_dump_json()
        partial = store.Partial(args.out.parent / f"{name}.parquet", "evaluate/answers", **same, how=how, references=ids)
        if not _answered(partial):
            jobs[name] = _Job(method, shown, partial)
    log.info("%d of %d methods to answer by", len(jobs), len(args.methods))
    if crew := workers.wanted() if jobs else 0:
        total = len(jobs) * len(rows)
        tables, _ = workers.lead(crew, [job.partial for job in jobs.values()], total, desc="evaluate", unit="answer")
        # one that a second job has finished meanwhile was none of the workers' business
        left = {name: table for (name, job), table in zip(jobs.items(), tables, strict=True) if not _answered(job.partial)}
        results = {name: in_order(store.rows(table), rows) for name, table in left.items()}
    else:
        own = workers.mine(rows, lambda row: row["image"])
        results = _ask(own, jobs, images, args, clock) if jobs else {}
        if workers.report({}, sum(result.num_rows for result in results.values())):
            return
    for name, result in results.items():
        method, _, partial = jobs[name]
        meta: Row = {"stage": "evaluate answer", "task": about["task"], "kind": about["kind"], "method": name, "flags": flags}
        meta |= {"version": config.Evaluate.version, "how": method.model_dump_json(), "depends": partial.folder.name}
        store.write_table(partial.out, result, "evaluate/answers", meta)
    parts = [_part(args.out.parent / f"{name}.parquet") for name in args.methods]
    content = {"dataset": "evaluate/answers", "rows": sum(part["rows"] for part in parts), "parts": parts}
    store.write_json(args.out, content)
    for name in args.methods:
        store.forget(args.out.parent / f"{name}.parquet")


class _Job(NamedTuple):
    """What one method has to do."""

    method: methods.Method
    shown: Shown
    partial: store.Partial


def _ask(
    rows: Sequence[Row], jobs: Mapping[str, _Job], images: Images, args: argparse.Namespace, clock: Clock
) -> dict[str, pa.Table]:
    """The answers of all methods to `rows`, by one model."""
    both = [(job.method, job.shown.get(row["question_id"], ())) for job in jobs.values() for row in rows]
    pictures = dict.fromkeys(ref.image for method, pairs in both if method.show != "caption" for _, ref in pairs)
    check_images(images, [row["image"] for row in rows], list(pictures))

    responder = Once(load_responder(args.lvlm, images, str(args.model) if args.model else None))
    clock.loaded()
    options = {"lvlm": args.lvlm, "suffix": args.suffix, "max_new_tokens": args.max_new_tokens}
    results = {}
    for name, (method, shown, partial) in jobs.items():
        before, since = len(responder.known), time.monotonic()
        results[name] = answer(rows, shown, responder, partial, method=method, **options)
        clock.note(partial.out, len(responder.known) - before, since=since)  # of several workers one's share, and its rate
    return results


def _answered(partial: store.Partial) -> bool:
    """Are the answers there, made from just what they depend on now?"""
    return partial.out.exists() and store.footer(partial.out)[1].get("depends") == partial.folder.name


def _part(path: Path) -> Row:
    metadata, meta = store.footer(path)
    return {"file": path.name, "rows": metadata.num_rows, "digest": meta["digest"]}


def _methods(text: str) -> dict[str, methods.Method]:
    try:
        return {name: methods.Method.model_validate(keys) for name, keys in json.loads(text).items()}
    except ValidationError as error:
        raise SurfError(f"methods.{config.explain(error)}", where="command line") from None


if __name__ == "__main__":
    cli.run(main)
