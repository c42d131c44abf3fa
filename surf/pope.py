"""POPE: object questions, answered by several methods and scored under five published rules.

    python -m surf.pope questions --file coco_pope_random.json --split random --out QUESTIONS
    python -m surf.pope answer --method surf --questions QUESTIONS --neighbors PART --catalog MANIFEST --references 2 \\
        --model results/model --out ANSWERS FLAGS
    python -m surf.pope table --answers ANSWERS… --out metrics.parquet --markdown metrics.md --figure metrics.svg
    python -m surf.pope score --questions coco_pope_random.json --answers answers.jsonl

`score` needs nothing else of surf: it scores a published answers file. Polling-based Object Probing Evaluation: Li et al.
2023, arXiv 2305.10355.
"""

import argparse
import hashlib
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from surf import cli, config, metrics, popetable, prompts, store
from surf.answer import unreadable
from surf.errors import SurfError
from surf.images import Images
from surf.models import Request, Responder
from surf.popefile import read_answers, read_questions
from surf.reanswer import references_of
from surf.shards import stable_hash
from surf.telemetry import Clock

log = logging.getLogger("surf")
FLUSH_ROWS = 256  # answers between two saves of unfinished work
Row = dict[str, Any]
References = Mapping[str, Sequence[tuple[int, prompts.Reference]]]  # by query image, most similar first


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: the first word says what to do."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if not words or words[0] not in _COMMANDS:
        found = f"there is no {words[0]!r}" if words else "what to do is missing"
        raise SurfError(found, where="python -m surf.pope", expected=f"one of {', '.join(_COMMANDS)}")
    _COMMANDS[words[0]](words[1:])


# --- questions --------------------------------------------------------------------------------------------------------


def questions(path: Path, split: str) -> pa.Table:
    """The questions of one split's POPE file (see `popefile.read_questions`) as a table of dataset `pope/questions`."""
    rows = [
        {"question_id": f"{split}#{row.question_id}", "image": row.image, "question": row.text, "label": row.label}
        for row in read_questions(path)
    ]
    return store.table_of(rows, "pope/questions")


def _questions(words: Sequence[str]) -> None:
    args = cli.parse(
        words,
        prog="pope questions",
        about="Read the POPE question file of one split.",
        paths=["file", "out"],
        extras={"split": {"required": True}},
    )
    table = questions(args.file, args.split)
    meta = {
        "stage": "pope questions",
        "version": config.Pope.version,
        "flags": f"--split {args.split}",
        "source": args.file.name,
        "sha256": hashlib.sha256(args.file.read_bytes()).hexdigest(),
    }
    store.write_table(args.out, table, "pope/questions", meta)
    log.info("%d questions on %d images", table.num_rows, len(set(table["image"].to_pylist())))


# --- answer -----------------------------------------------------------------------------------------------------------


def answer(
    questions: Sequence[Row],
    references: References,
    responder: Responder,
    partial: store.Partial,
    *,
    lvlm: config.Lvlm,
    options: config.Pope,
    seed: int = 0,
) -> pa.Table:
    """Greedy answers to all questions, each parsed by the headline rule.

    Args:
        questions: rows of `pope/questions`.
        references: of each query image; an image that is not among them is asked about without references.
        partial: finished rows of an earlier, killed run.

    Returns:
        table with the columns of `pope/answers`, in the order of `questions`.
    """
    done = {row["question_id"]: row for row in store.rows(partial.read())}
    todo = [row for row in questions if row["question_id"] not in done]
    for chunk in cli.chunks(todo, FLUSH_ROWS, desc="pope", unit="question"):
        used = [references.get(row["image"], ()) for row in chunk]
        requests = [
            Request(
                prompts.from_options(row["question"] + options.suffix, row["image"], [pair for _, pair in pairs], lvlm),
                stable_hash(seed, row["question_id"]),
            )
            for row, pairs in zip(chunk, used, strict=True)
        ]
        texts = responder.respond(requests, max_new_tokens=options.max_new_tokens, temperature=0.0)
        texts = [prompts.split_verdict(text)[0] for text in texts]  # of a model trained with finetune.verdict
        fresh = [
            {**row, "response": text, "prediction": metrics.verdict(text), "references": [image_id for image_id, _ in pairs]}
            for row, pairs, text in zip(chunk, used, texts, strict=True)
        ]
        partial.save(store.table_of(fresh, "pope/answers"))
        done.update((row["question_id"], row) for row in fresh)
    return store.table_of([done[row["question_id"]] for row in questions], "pope/answers")


def check_images(images: Images, questions: Sequence[Row], references: References) -> None:
    """Open every image before the model is loaded: an evaluation must be complete.

    Raises:
        SurfError: an image of a question, or of one of its references, cannot be opened.
    """
    asked = list(dict.fromkeys(row["image"] for row in questions))
    shown = [pair.image for name in asked for _, pair in references.get(name, ())]
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
        prog="pope answer",
        about="Answer the questions of one split with one method.",
        sections=["pope", "lvlm", "images"],
        paths=["questions", "out"],
        extras={
            "method": {"required": True, "help": "name of the method, kept in the file"},
            "references": {"type": int, "default": 0, "help": "references in the prompt"},
            "neighbors": {"type": Path, "help": "neighbours of the questions' images; needed with references"},
            "catalog": {"type": Path, "help": "manifest of the catalog; needed with references"},
            "model": {"type": Path, "help": "folder of a tuned model; without it lvlm.model answers"},
            "seed": {"type": int, "default": 0},
        },
    )
    clock = Clock()
    table = store.read_table(args.questions, "pope/questions")
    rows = store.rows(table)
    references = _references(args, rows)
    images = Images(args.images.roots, args.images.max_pixels, cached=1024)
    check_images(images, rows, references)

    from surf.models import lvlm

    responder = lvlm.load(args.lvlm, images, str(args.model) if args.model else None)
    clock.loaded()
    # resamples belong to the table, and no folder name says which weights lie in it
    flags = f"--references {args.references} --pope.max_new_tokens={args.pope.max_new_tokens} {cli.flags(lvlm=args.lvlm)}"
    version = config.Pope.version
    card = args.model / "model.json" if args.model else None
    partial = store.Partial(
        args.out,
        "pope/answers",
        flags=flags,
        suffix=args.pope.suffix,
        version=version,
        seed=args.seed,
        questions=store.digest(table),
        references={name: [image_id for image_id, _ in pairs] for name, pairs in references.items()},
        catalog=store.read_json(args.catalog) if references else None,
        model=[card.read_text(), card.stat().st_mtime_ns] if card and card.exists() else str(args.model),
    )
    result = answer(rows, references, responder, partial, lvlm=args.lvlm, options=args.pope, seed=args.seed)
    meta = {"stage": "pope answer", "version": version, "method": args.method, "flags": flags, "suffix": args.pope.suffix}
    store.write_table(args.out, result, "pope/answers", meta)
    clock.note(args.out, len(rows))
    partial.clear()


def _references(args: argparse.Namespace, rows: Sequence[Row]) -> References:
    if args.references == 0:
        return {}
    for flag in ("neighbors", "catalog"):
        if getattr(args, flag) is None:
            raise SurfError(f"--references {args.references} needs --{flag}", where=f"method {args.method}")
    found = references_of(args.neighbors, args.catalog, args.references)
    asked = {row["image"] for row in rows}
    short = sum(len(found.get(name, ())) < args.references for name in asked)
    if not asked & found.keys():
        raise SurfError("holds no neighbour of any image of the questions", where=str(args.neighbors))
    if short:
        log.warning("%d of %d images have fewer than %d references", short, len(asked), args.references)
    return found


# --- table ------------------------------------------------------------------------------------------------------------


def read_runs(paths: Sequence[Path]) -> dict[str, dict[str, list[Row]]]:
    """Method, split: rows of `pope/answers`. The file knows its method, the question ids know their split.

    Raises:
        SurfError: one method twice on one split, a file of several splits, an empty file.
    """
    runs: dict[str, dict[str, list[Row]]] = {}
    for path in paths:
        rows = store.rows(store.read_table(path, "pope/answers"))
        method = store.footer(path)[1].get("method", path.parent.name)
        splits = sorted({row["question_id"].partition("#")[0] for row in rows})
        if len(splits) != 1:
            raise SurfError(f"holds the splits {splits}", where=str(path), expected="answers to one split")
        if splits[0] in runs.setdefault(method, {}):
            raise SurfError(f"method {method!r} has two files for split {splits[0]!r}", where=str(path))
        runs[method][splits[0]] = rows
    return runs


def _table(words: Sequence[str]) -> None:
    args = cli.parse(
        words,
        prog="pope table",
        about="Compare the methods: metrics, Markdown table, figure.",
        sections=["pope"],
        paths=["out", "markdown", "figure"],
        extras={
            "answers": {"type": Path, "nargs": "+", "required": True, "help": "answers of all methods and splits"},
            "seed": {"type": int, "default": 0},
        },
    )
    runs = read_runs(args.answers)
    rows = popetable.measure(runs, args.pope.resamples, args.seed)
    text = popetable.markdown(rows, popetable.differences(runs, args.pope.resamples, args.seed))
    store.write_text(args.markdown, text)
    popetable.figure(rows, args.figure)
    flags = f"--pope.resamples={args.pope.resamples} --seed {args.seed}"
    meta = {"stage": "pope table", "version": config.Pope.version, "flags": flags}
    store.write_table(args.out, store.table_of(rows, "pope/metrics"), "pope/metrics", meta)


# --- score ------------------------------------------------------------------------------------------------------------


def score(questions: Path, answers: Path, split: str, resamples: int, seed: int = 0) -> list[Row]:
    """Rows of `pope/metrics` for a published answers file (method "answers") and the image-blind line."""
    asked = read_questions(questions)
    rows = [
        {"question_id": row.question_id, "image": row.image, "question": row.text, "label": row.label, "response": text}
        for row, text in zip(asked, read_answers(answers, asked), strict=True)
    ]
    measured = popetable.measure({"answers": {split: rows}}, resamples, seed)
    return [row for row in measured if row["split"] == split]


def _score(words: Sequence[str]) -> None:
    args = cli.parse(
        words,
        prog="pope score",
        about="Score a published answers file under five rules. Answers are joined to the questions by question_id.",
        sections=["pope"],
        paths=["questions", "answers"],
        extras={
            "split": {"help": "name of the split in the output (default: the question file's name)"},
            "json": {"type": Path, "help": "also write the numbers here"},
            "seed": {"type": int, "default": 0, "help": "seed of the bootstrap"},
        },
    )
    split = args.split or args.questions.stem
    rows = score(args.questions, args.answers, split, args.pope.resamples, args.seed)
    print(f"{args.answers}: {rows[0]['questions']} questions of {split}; percent (95 % interval, bootstrap over images)\n")
    print(popetable.plain(rows), end="")
    if args.json:
        store.write_json(args.json, rows)


_COMMANDS = {"questions": _questions, "answer": _answer, "table": _table, "score": _score}

if __name__ == "__main__":
    cli.run(main)
