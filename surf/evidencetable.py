"""Measures as tables (Markdown, and the same rows for the page) and as pictures."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from surf.intervals import Estimate
from surf.measures import ALL, BLIND, CHANCE, Run, baselines, random_twin
from surf.tables import percent, save
from surf.tables import table as as_markdown

Row = dict[str, Any]
Tasks = Mapping[str, tuple[Sequence[Row], Sequence[Run]]]  # task: its questions, its runs
_SUBSETS = {
    "balanced": "Balanced questions: every object is there as often as not, so that no prior scores more than 50.",
    "leaked": "Questions on photographs that are in the retrieval corpus too (copies are never shown as references).",
    "unleaked": "Questions on photographs that are not in the retrieval corpus.",
}
HOW_TO_READ = (
    "Percent; in brackets the 95 % interval, bootstrap over images. *Random*: the score of the same model with as many random"
    " references. *Rescue*: of the questions that {zero} gets wrong, the share that the method gets right. *Harm*: of those"
    " that it gets right, the share that the method gets wrong. *Minus*: difference of the scores in points, both on the same"
    " resampled images, and p of McNemar's exact test with images as units. *Refs*: references in"
    " the prompt, on average. `image-blind` answers by what is mostly true of the same question on other images; `chance`"
    " guesses."
)


class Table(NamedTuple):
    """A heading, what it shows, the names of the columns, and rows of texts; the first column is a method."""

    title: str
    about: str
    head: list[str]
    rows: list[list[str]]


class Lookup:
    """Measures by place: split, subset, method, measure and method compared with."""

    def __init__(self, measured: Sequence[Row], task: str) -> None:
        self.rows = {
            (row["split"], row["subset"], row["method"], row["measure"], row.get("against")): row
            for row in measured
            if row["task"] == task
        }

    def text(self, method: str, measure: str, against: str | None = None, *, split: str = ALL, subset: str = ALL) -> str:
        """Value and interval in percent, empty where there is none."""
        row = self.rows.get((split, subset, method, measure, against))
        if row is None:
            return ""
        if measure == "references":
            return f"{row['value']:.1f}"
        sign = measure == "difference"
        text = percent(Estimate(row["value"], row.get("low"), row.get("high")), sign=sign)
        return f"{text}, p {probability(row['p'])}" if row.get("p") is not None else text

    def questions(self, subset: str) -> int:
        """How many questions a subset has."""
        return next((row["questions"] for key, row in self.rows.items() if key[:2] == (ALL, subset)), 0)


def tables(measured: Sequence[Row], tasks: Tasks) -> dict[str, list[Table]]:
    """The tables of every task."""
    return {task: list(_tables(Lookup(measured, task), *tasks[task])) for task in tasks}


def _tables(look: Lookup, questions: Sequence[Row], runs: Sequence[Run]) -> Iterator[Table]:
    zero, vanilla = baselines(runs)
    names = [run.method for run in runs]
    lines = [*names, CHANCE]
    others = [run for run in (zero, vanilla) if run]
    splits = list(dict.fromkeys(row["split"] for row in questions))
    head = ["Method", "Score", "Random", "Rescue", "Harm", *(f"minus {run.method}" for run in others), "Refs"]
    rows = []
    for run in runs:
        twin = random_twin(run, runs)
        cells = [run.method, look.text(run.method, "score"), look.text(twin.method, "score") if twin else ""]
        cells += [look.text(run.method, name, zero.method if zero else None) for name in ("rescue", "harm")]
        cells += [look.text(run.method, "difference", other.method) for other in others]
        rows.append([*cells, look.text(run.method, "references")])
    rows.append([CHANCE, look.text(CHANCE, "score"), *[""] * (len(head) - 2)])
    images = len({row["image"] for row in questions})
    about = f"{len(questions):,} questions on {images:,} images. " + HOW_TO_READ.format(
        zero=zero.method if zero else "zero-shot"
    )
    yield Table("All methods", about, head, [row for row in rows if row[1]])
    if len(splits) > 1:
        rows = [[name, *(look.text(name, "score", split=split) for split in splits)] for name in lines]
        yield Table("By split", "Score.", ["Method", *splits], [row for row in rows if any(row[1:])])
    for subset, about in _SUBSETS.items():
        rows = [[name, look.text(name, "score", subset=subset)] for name in lines]
        rows = [
            [*row, *(look.text(row[0], "difference", run.method, subset=subset) for run in others)] for row in rows if row[1]
        ]
        if rows:
            head = ["Method", "Score", *(f"minus {run.method}" for run in others)]
            yield Table(subset.capitalize(), f"{look.questions(subset):,} of {len(questions):,} questions. {about}", head, rows)
    swept = [run for run in runs if "@" in run.method]
    if swept:
        bases = [run.method.partition("@")[0] for run in swept]
        rows = [
            [
                run.method,
                look.text(run.method, "score"),
                *(look.text(run.method, name, base) for name in ("difference", "changed")),
            ]
            for run, base in zip(swept, bases, strict=True)
        ]
        about = "One thing changed: the number of references, where they come from, their order, or what is shown of them."
        about += " *Changed*: share of all questions of which one of the two is right and the other wrong."
        yield Table("Sweeps", about, ["Method", "Score", "minus the method itself", "Changed"], rows)
    own = list(dict.fromkeys(key[3] for key in look.rows if key[3] not in _SHARED))
    if own:
        rows = [[name, *(_plain(look.rows.get((ALL, ALL, name, measure, None))) for measure in own)] for name in names]
        about = "The task's own numbers, on their usual scale; 95 % intervals by a jackknife over 20 groups of images."
        yield Table("The task's own numbers", about, ["Method", *own], rows)


_SHARED = ("score", "rescue", "harm", "difference", "changed", "references")


def markdown(measured: Sequence[Row], tasks: Tasks) -> str:
    """All tables as one Markdown text."""
    lines = ["# Evidence", ""]
    for task, found in tables(measured, tasks).items():
        lines += [f"## {task}", ""]
        for table in found:
            numbers = range(1, len(table.head))
            lines += [f"### {table.title}", "", table.about, "", as_markdown(table.head, table.rows, right=numbers), ""]
    return "\n".join(lines).rstrip() + "\n"


def curves(runs: Sequence[Run]) -> dict[str, list[tuple[int, str]]]:
    """Methods that differ in nothing but their number of references: (number, method), by the name of the first with any."""
    groups: dict[str, list[tuple[int, str]]] = {}
    for run in runs:
        if run.how is not None:
            same = run.how.model_copy(update={"references": 0}).model_dump_json()
            groups.setdefault(same, []).append((run.how.references, run.method))
    named = [([method for count, method in group if count], group) for group in groups.values()]
    return {names[0]: sorted(group) for names, group in named if len(names) > 1}


def figure(measured: Sequence[Row], task: str, runs: Sequence[Run], path: Path) -> None:
    """Score and interval of every method as dots, image-blind and chance as lines; below, scores over the number of
    references, where that was swept. As SVG; equal rows, equal bytes."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    look = Lookup(measured, task)
    scores = {key[2]: row for key, row in look.rows.items() if key[:2] == (ALL, ALL) and key[3] == "score"}
    methods = [name for name in scores if name not in (BLIND, CHANCE)]
    swept = curves(runs)
    heights = [1.1 + 0.26 * len(methods), *[2.6] * bool(swept)]
    canvas = FigureCanvasSVG(Figure(figsize=(6.4, sum(heights)), layout="constrained"))
    axes, *below = canvas.figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    for place, name in enumerate(methods):
        row = scores[name]
        if row["low"] is not None:
            axes.plot([100 * row["low"], 100 * row["high"]], [place, place], color="0.3", linewidth=1.5)
        axes.plot(100 * row["value"], place, "o", color="C3" if "@" in name else "C0", markersize=5)
    for name, style in ((BLIND, "dashed"), (CHANCE, "dotted")):
        if name in scores:
            axes.axvline(100 * scores[name]["value"], color="0.1", linestyle=style, linewidth=1, label=name)
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set_xlabel(f"{task}: score (%)")
    axes.grid(axis="x", color="0.9")
    if axes.get_legend_handles_labels()[0]:
        canvas.figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize="small")
    for lower in below:
        for number, (name, points) in enumerate(swept.items()):
            rows = [scores[method] for _, method in points]
            low, high = ([100 * abs(row["value"] - (row[side] or row["value"])) for row in rows] for side in ("low", "high"))
            counts, values = [count for count, _ in points], [100 * row["value"] for row in rows]
            lower.errorbar(
                counts, values, yerr=[low, high], marker="o", markersize=4, capsize=2, label=name, color=f"C{number}"
            )
        lower.set_xticks(sorted({count for points in swept.values() for count, _ in points}))
        lower.set_xlabel("references, at most")
        lower.set_ylabel("score (%)")
        lower.grid(axis="y", color="0.9")
        lower.legend(frameon=False, fontsize="small")
    for one in (axes, *below):
        one.set_axisbelow(True)
        one.spines[["top", "right", "left"]].set_visible(False)
    save(canvas, path)


def probability(p: float) -> str:
    """Two digits, and no more zeros than tell something."""
    return f"{p:.2f}" if p >= 0.01 else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _plain(row: Row | None) -> str:
    if row is None:
        return ""
    if row.get("low") is None:
        return f"{row['value']:.3g}"
    return f"{row['value']:.3g} ({row['low']:.3g} to {row['high']:.3g})"
