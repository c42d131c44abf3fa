"""The page of the evidence: every table, the plots, and cases that the tuned model rescued or harmed, with their images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surf import __version__, evidencetable, measures, pages
from surf.evidencetable import Tasks
from surf.images import Images
from surf.measures import Run
from surf.methods import Method
from surf.reanswer import lookup

Row = dict[str, Any]
KINDS = ("rescued", "harmed")


def cases(
    questions: Sequence[Row], runs: Sequence[Run], answers: Mapping[str, tuple[Method, Sequence[Row]]], count: int
) -> Row:
    """Up to `count` rescued and as many harmed questions of one task, chosen by hash: {before, after, rescued, harmed}.

    Compared are the zero-shot method and the first one of the tuned model with references, or else the last method.
    """
    before, _ = measures.baselines(runs)
    methods = [run for run in runs if run.how is not None]
    after = next((run for run in methods if run.how and run.how.model == "tuned" and run.how.references), methods[-1])
    if before is None or before is after:
        return {"before": "", "after": after.method, **{kind: [] for kind in KINDS}}
    shown = {row["question_id"]: row["references"] for row in answers[after.method][1]}
    found: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
    for i, row in enumerate(questions):
        if before.right[i] != after.right[i]:
            # one question may stand in several splits: it is shown once
            found["rescued" if after.right[i] else "harmed"].setdefault(f"{row['image']}\n{row['question']}", i)
    made: Row = {"before": before.method, "after": after.method}
    for kind, places in found.items():
        made[kind] = [
            {
                **{key: questions[i][key] for key in ("question_id", "image", "question")},
                "gold": "; ".join(dict.fromkeys(questions[i]["answers"])),
                "said": [before.responses[i], after.responses[i]],
                "references": shown[questions[i]["question_id"]],
            }
            for i in (places[text] for text in pages.stable(places, count))
        ]
    return made


def page(measured: Sequence[Row], tasks: Tasks, found: Mapping[str, Row], catalog: Path, images: Images, figures: Path) -> str:
    """The page as text; equal results give an equal page. `figures`: the folder of the plots TASK.svg."""
    wanted = {i for of in found.values() for kind in KINDS for row in of[kind] for i in row["references"]}
    known = lookup(catalog, wanted) if wanted else {}
    for of in found.values():
        for kind in KINDS:
            for row in of[kind]:
                row["pairs"] = [known[i] for i in row["references"] if i in known]
    return pages.render(
        "evidence.html.jinja",
        version=__version__,
        tables=evidencetable.tables(measured, tasks),
        figures={task: pages.data_uri((figures / f"{task}.svg").read_bytes(), "svg+xml") for task in tasks},
        cases=found,
        kinds=KINDS,
        thumb=pages.thumbnailer(images),
    )
