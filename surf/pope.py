"""POPE tables: finished answers under five published rules.

    python -m surf.pope table --answers ANSWERS… --out metrics.parquet --markdown metrics.md --figure metrics.svg
    python -m surf.pope score --questions coco_pope_random.json --answers answers.jsonl

`score` needs nothing else of surf: it scores a published answers file. Polling-based Object Probing Evaluation: Li et al.
2023, arXiv 2305.10355.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surf import cli, config, popetable, store
from surf.errors import SurfError
from surf.popefile import read_answers, read_questions

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: the first word says what to do."""
    cli.dispatch({"table": _table, "score": _score}, argv, prog="pope", about=__doc__ or "")


# --- table ------------------------------------------------------------------------------------------------------------


def read_runs(paths: Sequence[Path]) -> dict[str, dict[str, list[Row]]]:
    """Method, split: rows of `evaluate/answers`, each with its `label`. A file knows its method and task.

    Args:
        paths: files of answers, or the manifests that list them.

    Splits of several POPE tasks (other images, other questions) are told apart by the task's name.

    Raises:
        SurfError: one method twice on one task; answers to questions of another kind.
    """
    files = [(path, store.footer(path)[1]) for path in store.files_of(paths, "evaluate/answers")]
    several = len({meta.get("task") for _, meta in files}) > 1
    runs: dict[str, dict[str, list[Row]]] = {}
    for path, meta in files:
        rows = store.rows(store.read_table(path, "evaluate/answers"))
        if meta.get("kind") != "pope":
            raise SurfError(f"answers a task of kind {meta.get('kind')}", where=str(path), expected="kind pope")
        splits: dict[str, list[Row]] = {}
        for row in rows:
            name = f"{meta['task']}/{row['split']}" if several else row["split"]
            splits.setdefault(name, []).append({**row, "label": row["answers"] == ["yes"]})
        of = runs.setdefault(meta["method"], {})
        if twice := of.keys() & splits.keys():
            raise SurfError(f"method {meta['method']!r} has two files for split {min(twice)!r}", where=str(path))
        of.update(splits)
    return runs


def _table(words: Sequence[str]) -> None:
    args = cli.parse(
        words,
        prog="pope table",
        about="Compare the methods: metrics, Markdown table, figure.",
        paths=["out", "markdown", "figure"],
        extras={
            "answers": {"type": Path, "nargs": "+", "required": True, "help": "answers, or their manifests"},
            "methods": {"nargs": "*", "default": [], "help": "order of the methods in the tables"},
            "resamples": {"type": int, "default": 2000, "help": "of the bootstrap"},
            "seed": {"type": int, "default": 0, "help": "of the bootstrap"},
        },
    )
    found = read_runs(args.answers)
    runs = {name: found[name] for name in dict.fromkeys([*args.methods, *found]) if name in found}
    rows = popetable.measure(runs, args.resamples, args.seed)
    text = popetable.markdown(rows, popetable.differences(runs, args.resamples, args.seed))
    store.write_text(args.markdown, text)
    popetable.figure(rows, args.figure)
    meta = {"stage": "pope table", "version": config.Evaluate.version, "flags": f"--resamples {args.resamples}"}
    store.write_table(args.out, store.table_of(rows, "pope/metrics"), "pope/metrics", {**meta, "seed": args.seed})


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
        paths=["questions", "answers"],
        extras={
            "resamples": {"type": int, "default": 2000, "help": "of the bootstrap"},
            "split": {"help": "name of the split in the output (default: the question file's name)"},
            "json": {"type": Path, "help": "also write the numbers here"},
            "seed": {"type": int, "default": 0, "help": "seed of the bootstrap"},
        },
    )
    split = args.split or args.questions.stem
    rows = score(args.questions, args.answers, split, args.resamples, args.seed)
    print(f"{args.answers}: {rows[0]['questions']} questions of {split}; percent (95 % interval, bootstrap over images)\n")
    print(popetable.plain(rows), end="")
    if args.json:
        store.write_json(args.json, rows)


if __name__ == "__main__":
    cli.run(main)
