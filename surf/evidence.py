"""What all answers are worth: measures of every method on every task, their tables, plots, and a page with cases.

    python -m surf.evidence --answers results/evaluate/*/answers/*/_manifest.json --catalog results/catalog/_manifest.json \\
        --out results/evidence --images.roots '["images"]'

Reads finished answer files only. Writes scores.parquet (every question of every method), measures.parquet and measures.csv,
table.md, TASK.svg and index.html.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv as csv

from surf import cli, config, evidencepage, evidencetable, measures, store
from surf.errors import SurfError
from surf.images import Images, identity
from surf.measures import Run
from surf.methods import Method

Row = dict[str, Any]
Answers = dict[str, tuple[Method, list[Row]]]  # method: its definition and its answers


def read(paths: Sequence[Path], methods: Sequence[str] = ()) -> dict[str, tuple[str, Answers]]:
    """Task: its kind, and the answers of every method, in the order of `methods`. A file knows its task and method.

    Args:
        paths: files of answers, or the manifests that list them.

    Raises:
        SurfError: one method twice on one task.
    """
    tasks: dict[str, tuple[str, Answers]] = {}
    for path in store.files_of(paths, "evaluate/answers"):
        rows = store.rows(store.read_table(path, "evaluate/answers"))
        about = store.footer(path)[1]
        _, of = tasks.setdefault(about["task"], (about["kind"], {}))
        if about["method"] in of:
            raise SurfError(f"method {about['method']!r} has two files for task {about['task']!r}", where=str(path))
        of[about["method"]] = (Method.model_validate_json(about["how"]), rows)
    ordered = {task: dict.fromkeys([*methods, *of]) for task, (_, of) in tasks.items()}
    return {task: (kind, {name: of[name] for name in ordered[task] if name in of}) for task, (kind, of) in tasks.items()}


def leaks(questions: Sequence[Row], catalog: Path) -> np.ndarray:
    """bool [questions]: the image's photograph (see `images.identity`) is in the retrieval corpus, under whatever name."""
    corpus = {
        identity(name)
        for part in store.parts_of(catalog, "catalog")
        for name in store.read_table(part, "catalog", ["image"])["image"].to_pylist()
    }
    return np.array([identity(row["image"]) in corpus for row in questions], bool)


def scored(task: str, kind: str, questions: Sequence[Row], runs: Sequence[Run], leaked: np.ndarray) -> list[Row]:
    """Rows of `evidence/scores`."""
    even = measures.balanced(kind, questions)
    return [
        {
            **{
                "task": task,
                "method": run.method,
                "score": run.scores[i],
                "right": None if kind == "caption" else bool(run.right[i]),
            },
            **{key: row[key] for key in ("question_id", "split", "image")},
            **{"leaked": bool(leaked[i]), "balanced": bool(even[i]), "references": int(run.references[i])},
        }
        for run in runs
        for i, row in enumerate(questions)
    ]


def short(row: Row) -> Row:
    """The row with six digits of every number: more would say nothing."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = cli.parse(
        argv,
        prog="evidence",
        about="Measure every method on every task; tables, plots, a page.",
        sections=["images"],
        paths=["catalog", "out"],
        extras={
            "answers": {"type": Path, "nargs": "+", "required": True, "help": "answers to all tasks, or their manifests"},
            "methods": {"nargs": "*", "default": [], "help": "order of the methods in the tables"},
            "resamples": {"type": int, "default": 2000, "help": "of the bootstrap"},
            "examples": {"type": int, "default": 8, "help": "rescued and harmed questions shown, of each kind"},
            "seed": {"type": int, "default": 0, "help": "of the bootstrap"},
        },
    )
    measured: list[Row] = []
    scores: list[Row] = []
    tasks: dict[str, tuple[list[Row], list[Run]]] = {}
    found: Mapping[str, tuple[str, Answers]] = read(args.answers, args.methods)
    for task, (kind, answers) in found.items():
        questions, runs = measures.runs_of(kind, answers, task)
        leaked = leaks(questions, args.catalog)
        tasks[task] = questions, runs
        scores += scored(task, kind, questions, runs, leaked)
        measured += map(short, measures.measure(task, kind, questions, runs, leaked, args.resamples, args.seed))
    meta = {
        "stage": "evidence",
        "version": config.Evaluate.version,
        "flags": f"--resamples {args.resamples}",
        "seed": args.seed,
    }
    store.write_table(args.out / "scores.parquet", store.table_of(scores, "evidence/scores"), "evidence/scores", meta)
    table = store.table_of(measured, "evidence/measures")
    store.write_table(args.out / "measures.parquet", table, "evidence/measures", meta)
    with store.replacing(args.out / "measures.csv") as temporary:
        csv.write_csv(table, temporary)
    store.write_text(args.out / "table.md", evidencetable.markdown(measured, tasks))
    for task in tasks:
        evidencetable.figure(measured, task, tasks[task][1], args.out / f"{task}.svg")
    images = Images(args.images.roots, args.images.max_pixels)
    counts = {task: 0 if kind == "caption" else args.examples for task, (kind, _) in found.items()}
    cases = {task: evidencepage.cases(*tasks[task], found[task][1], counts[task]) for task in tasks}
    store.write_text(args.out / "index.html", evidencepage.page(measured, tasks, cases, args.catalog, images, args.out))


if __name__ == "__main__":
    cli.run(main)
