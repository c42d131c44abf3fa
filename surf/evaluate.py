"""Answer the questions of an evaluation task with one method.

    python -m surf.evaluate questions --task pope --kind pope --files '{"random": "coco_pope_random.json"}' --out QUESTIONS
    python -m surf.evaluate answer --questions QUESTIONS --method surf --how '{"model": "tuned", "references": 2}' \\
        --neighbors PART --catalog MANIFEST --candidates FILE… --model results/model --suffix … --out ANSWERS FLAGS

What the answers are worth is the business of `evidence` and `pope`: they read finished answer files, so that another way of
scoring asks no model again.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from surf import cli, config, prompts, references, store
from surf.answer import unreadable
from surf.errors import SurfError
from surf.images import Images
from surf.models import Request, Responder
from surf.references import Shown
from surf.shards import stable_hash
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
    method: config.Method,
    lvlm: config.Lvlm,
    suffix: str = "",
    max_new_tokens: int = 16,
    seed: int = 0,
) -> pa.Table:
    """Greedy answers to all questions.

    A question that several splits ask about one image with the same references is asked once. Questions on one image are
    handed to the model together.

    Args:
        questions: rows of `evaluate/questions`.
        shown: the references of each question; one that is not among them is asked without.
        partial: finished rows of an earlier, killed run.

    Returns:
        table with the columns of `evaluate/answers`, in the order of `questions`.
    """
    done = {row["question_id"]: row for row in store.rows(partial.read())}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in questions:
        if row["question_id"] not in done:
            ids = tuple(image_id for image_id, _ in shown.get(row["question_id"], ()))
            groups.setdefault((row["image"], row["question"], ids), []).append(row)
    together = sorted(groups.values(), key=lambda same: same[0]["image"])

    def ask(rows: Sequence[Row], used: Sequence[Sequence[tuple[int, prompts.Reference]]]) -> tuple[list[Request], list[str]]:
        requests = [
            Request(
                prompts.from_options(row["question"] + suffix, row["image"], [ref for _, ref in pairs], lvlm, method.show),
                stable_hash(seed, row["question_id"]),
            )
            for row, pairs in zip(rows, used, strict=True)
        ]
        return requests, responder.respond(requests, max_new_tokens=max_new_tokens, temperature=0.0) if rows else []

    for chunk in cli.chunks(together, FLUSH_ROWS, desc="evaluate", unit="question"):
        first = [same[0] for same in chunk]
        used = [list(shown.get(row["question_id"], ())) for row in first]
        confidence: list[float | None] = [None] * len(first)
        if method.gate is None:
            texts = ask(first, used)[1]
        else:
            requests, texts = ask(first, [[] for _ in first])
            logliks = responder.loglik(requests, texts)
            confidence = [math.exp(value) if text else 0.0 for value, text in zip(logliks, texts, strict=True)]
            unsure = [i for i, value in enumerate(confidence) if value is not None and value < method.gate and used[i]]
            again = ask([first[i] for i in unsure], [used[i] for i in unsure])[1]
            texts = list(texts)
            for i, text in zip(unsure, again, strict=True):
                texts[i] = text
            used = [pairs if i in set(unsure) else [] for i, pairs in enumerate(used)]
        fresh = [
            {**row, "response": text, "references": [image_id for image_id, _ in pairs], "confidence": sure}
            for same, text, pairs, sure in zip(chunk, texts, used, confidence, strict=True)
            for row in same
        ]
        partial.save(store.table_of(fresh, "evaluate/answers"))
        done.update((row["question_id"], row) for row in fresh)
    return store.table_of([done[row["question_id"]] for row in questions], "evaluate/answers")


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
        about="Answer the questions of one task with one method.",
        sections=["lvlm", "images"],
        paths=["questions", "out"],
        extras={
            "method": {"required": True, "help": "name of the method, kept in the file"},
            "how": {"required": True, "type": _method, "help": "the method as JSON: the keys of evaluate.methods.NAME"},
            "neighbors": {"type": Path, "help": "neighbours of the questions' images; needed with retrieved references"},
            "candidates": {"type": Path, "nargs": "*", "default": [], "help": "scores of the candidates, as the method needs"},
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
    shown = references.shown(rows, args.how, files, images, args.seed)
    pictures = [ref.image for pairs in shown.values() for _, ref in pairs if args.how.show != "caption"]
    check_images(images, [row["image"] for row in rows], pictures)

    from surf.models import lvlm

    responder = lvlm.load(args.lvlm, images, str(args.model) if args.model else None)
    clock.loaded()
    flags = f"--suffix {args.suffix!r} --max-new-tokens {args.max_new_tokens} {cli.flags(lvlm=args.lvlm)}"
    how = args.how.model_dump_json()
    card = args.model / "model.json" if args.model else None
    partial = store.Partial(
        args.out,
        "evaluate/answers",
        flags=flags,
        how=how,
        version=config.Evaluate.version,
        seed=args.seed,
        questions=store.digest(table),
        references={key: [image_id for image_id, _ in pairs] for key, pairs in shown.items()},
        catalog=store.read_json(args.catalog) if shown else None,
        # no folder name says which weights lie in it
        model=[card.read_text(), card.stat().st_mtime_ns] if card and card.exists() else str(args.model),
    )
    result = answer(
        rows,
        shown,
        responder,
        partial,
        method=args.how,
        lvlm=args.lvlm,
        suffix=args.suffix,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    meta = {"stage": "evaluate answer", "version": config.Evaluate.version, "task": about["task"], "kind": about["kind"]}
    store.write_table(args.out, result, "evaluate/answers", {**meta, "method": args.method, "how": how, "flags": flags})
    clock.note(args.out, len(rows))
    partial.clear()


def _method(text: str) -> config.Method:
    try:
        return config.Method.model_validate_json(text)
    except ValidationError as error:
        raise SurfError(f"how.{config.explain(error)}", where="command line") from None


if __name__ == "__main__":
    cli.run(main)
