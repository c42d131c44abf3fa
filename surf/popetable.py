"""POPE numbers as rows, as Markdown, as plain text and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surf import metrics
from surf.errors import SurfError
from surf.metrics import HEADLINE, METRICS, RULES, Estimate, Part
from surf.tables import percent, save, table

BLIND = "image-blind"  # a method of its own: see `metrics.blind`
MEAN = "mean"  # a split of its own: the plain mean over the splits

Row = dict[str, Any]
Runs = Mapping[str, Mapping[str, Sequence[Row]]]  # method, split: rows with question_id, image, question, label, response
_NAMES = {"accuracy": "Accuracy", "precision": "Precision", "recall": "Recall", "f1": "F1"}
_NAMES |= {"yes_ratio": "Yes", "unparsed": "Unparsed"}


def measure(runs: Runs, resamples: int, seed: int) -> list[Row]:
    """Rows of `pope/metrics`: every method, and the image-blind line, on every split, under every rule.

    A method that answered all splits also gets the split "mean". Shares in [0, 1]; 95 % intervals over images.

    Raises:
        SurfError: two methods answered different questions of one split; a reserved name.
    """
    splits = _splits(runs)
    everyone = {**runs, BLIND: {split: _blind(next(iter(of.values()))) for split, of in splits.items()}}
    rows = []
    for method, answered in everyone.items():
        order = [split for split in splits if split in answered]
        groups = [(split, [split]) for split in order] + ([(MEAN, order)] if len(order) == len(splits) else [])
        for name, members in groups:
            questions = sum(len(answered[split]) for split in members)
            for rule in RULES:
                found = metrics.summary([_part(answered[split], rule) for split in members], resamples, seed)
                rows += [
                    {"method": method, "split": name, "rule": rule, "metric": metric, **value._asdict(), "questions": questions}
                    for metric, value in found.items()
                ]
    return rows


def differences(runs: Runs, resamples: int, seed: int) -> list[tuple[str, str, Estimate]]:
    """(later method, first method, difference in mean accuracy over all splits) of the methods that have all splits."""
    splits = _splits(runs)
    parts = {
        method: [_part(answered[split], HEADLINE) for split in splits]
        for method, answered in runs.items()
        if len(answered) == len(splits)
    }
    first = next(iter(parts), None)
    return [
        (later, first, metrics.difference(parts[later], parts[first], resamples, seed)["accuracy"])
        for later in parts
        if first is not None and later != first
    ]


def markdown(rows: Sequence[Row], deltas: Sequence[tuple[str, str, Estimate]] = ()) -> str:
    """The tables of a report, in percent."""
    cells, places = _cells(rows)
    lines = [
        "# POPE",
        "",
        f"Percent; in brackets the 95 % interval, bootstrap over images. Rule `{HEADLINE}`: an answer counts by the word yes or"
        " no in it; with neither or both it is unparsed and wrong. `image-blind` sees no image: it gives each object the label"
        " that it has most often on the other images.",
        "",
    ]
    body = []
    for method, split in places:
        values = [cells[method, split, HEADLINE, metric] for metric in METRICS]
        body.append([method, split, percent(values[0]), *(_percent(value.value) for value in values[1:])])
    head = ["Method", "Split", *(_NAMES[metric] for metric in METRICS)]
    lines += [table(head, body, right=range(2, len(head)))]
    lines += ["", "## The same answers under five rules", "", "Accuracy / F1. Only the first rule is ours.", ""]
    body = []
    for method, split in places:
        if method == BLIND:  # nothing but yes and no: every rule reads it alike
            continue
        both = [[cells[method, split, rule, metric].value for metric in ("accuracy", "f1")] for rule in RULES]
        body.append([method, split, *(" / ".join(map(_percent, pair)) for pair in both)])
    lines += [table(["Method", "Split", *RULES], body, right=range(2, 2 + len(RULES)))]
    if deltas:
        lines += ["", "## Differences", "", "Mean accuracy over the splits, in points; paired bootstrap over images.", ""]
        body = [[later, earlier, percent(delta, sign=True)] for later, earlier, delta in deltas]
        lines += [table(["Method", "minus", "Difference"], body, right=[2])]
    return "\n".join(lines) + "\n"


def plain(rows: Sequence[Row]) -> str:
    """A table for the terminal: one line a rule, in percent, and the image-blind line at the end."""
    cells, places = _cells(rows)
    lines = [["rule", *METRICS]]
    for method, split in places:
        if split != MEAN:
            for rule in RULES if method != BLIND else [HEADLINE]:
                name = BLIND if method == BLIND else rule
                lines.append([name, *(percent(cells[method, split, rule, metric]) for metric in METRICS)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in lines)
    return "\n".join(text) + "\n"


def figure(rows: Sequence[Row], path: Path) -> None:
    """Bars of accuracy under the headline rule, methods side by side for each split, as SVG; equal rows, equal bytes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    cells, places = _cells(rows)
    splits = list(dict.fromkeys(split for _, split in places))
    methods = [method for method in dict.fromkeys(method for method, _ in places) if method != BLIND]
    canvas = FigureCanvasSVG(Figure(figsize=(1.6 + max(1.6, 0.18 * len(methods)) * len(splits), 3.6), layout="constrained"))
    axes = canvas.figure.add_subplot()
    width = 0.8 / max(len(methods), 1)
    for number, method in enumerate(methods):
        values = [(place, cells.get((method, split, HEADLINE, "accuracy"))) for place, split in enumerate(splits)]
        drawn = [(place + (number - (len(methods) - 1) / 2) * width, value) for place, value in values if value]
        axes.bar(
            [x for x, _ in drawn],
            [100 * value.value for _, value in drawn],
            0.92 * width,
            color=matplotlib.colormaps["tab20"](number % 20),
            label=method,
            yerr=[[100 * _reach(value, side) for _, value in drawn] for side in ("low", "high")],
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "0.25"},
        )
    for place, split in enumerate(splits):
        value = 100 * cells[BLIND, split, HEADLINE, "accuracy"].value
        label = "_nolegend_" if place else BLIND  # one entry in the legend is enough
        axes.hlines(value, place - 0.45, place + 0.45, colors="0.1", linestyles="dashed", linewidth=1, label=label)
    axes.set_xticks(range(len(splits)), splits)
    axes.set_ylim(0, 100)
    axes.set_ylabel("POPE accuracy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    canvas.figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize="small")
    save(canvas, path)


def _splits(runs: Runs) -> dict[str, dict[str, Sequence[Row]]]:
    """Split: method: rows. Checks that all methods answered the same questions."""
    if BLIND in runs:
        raise SurfError(f"a method is named {BLIND!r}", where="evaluate.methods", expected="another name: this one is reserved")
    splits: dict[str, dict[str, Sequence[Row]]] = {}
    for method, answered in runs.items():
        for split, rows in answered.items():
            splits.setdefault(split, {})[method] = rows
    if MEAN in splits:
        raise SurfError(f"a split is named {MEAN!r}", where="evaluate.tasks", expected="another name: this one is reserved")
    for split, of in splits.items():
        asked = {
            method: sorted((row["question_id"], row["image"], row["label"]) for row in rows) for method, rows in of.items()
        }
        first = next(iter(asked))
        for method, questions in asked.items():
            if questions != asked[first]:
                raise SurfError(
                    f"methods {first!r} and {method!r} answered different questions",
                    where=f"split {split}",
                    expected="one question file for all methods",
                    next="run snakemake pope again: one of the answers is older than the questions",
                )
    return splits


def _blind(rows: Sequence[Row]) -> list[Row]:
    said = metrics.blind(*([row[key] for row in rows] for key in ("question", "label", "image")))
    return [{**row, "response": "Yes" if yes else "No"} for row, yes in zip(rows, said, strict=True)]


def _part(rows: Sequence[Row], rule: str) -> Part:
    counts = metrics.outcomes(rule, [row["response"] for row in rows], [row["label"] for row in rows])
    return counts, [row["image"] for row in rows]


def _cells(rows: Sequence[Row]) -> tuple[dict[tuple[str, str, str, str], Estimate], list[tuple[str, str]]]:
    cells = {
        (row["method"], row["split"], row["rule"], row["metric"]): Estimate(row["value"], row["low"], row["high"])
        for row in rows
    }
    return cells, list(dict.fromkeys((row["method"], row["split"]) for row in rows))


def _reach(value: Estimate, side: str) -> float:
    end = getattr(value, side)
    return 0.0 if end is None else abs(end - value.value)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
