"""The tables of the controlled experiment, from the answers that `benchmarks/experiment.py` keeps.

    python benchmarks/experiment_tables.py TABLES

Reads questions.parquet and right.parquet in the folder TABLES; writes tables.parquet, tables.md and shares.svg there.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from surf import intervals, tables
from surf.errors import SurfError

OTHERS = ("zero-shot", "vanilla-rag", "surf")  # what methods are compared with
OURS = ("surf", "harmed")  # the paper's samples, and surf's own
SHOWN = {"told-rag": "#7f7f7f", "filter-judged": "#bcbd22", "zero-shot": "#000000", "harmed": "#c0392b", "surf": "#1f77b4"}
SHOWN |= {"vanilla-rag": "#2ca02c", "sft": "#9467bd"}  # method: colour in shares.svg
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of the pipeline. labels: the judge of `score`, answer or loglik."""

    share: float
    seed: int
    labels: str = "answer"

    @property
    def name(self) -> str:
        return f"{self.labels}-{self.share:g}-{self.seed}"

    @property
    def world(self) -> str:
        return f"world-{self.seed}"


@dataclass(frozen=True)
class Answers:
    """What a cell's methods answered. right: bool [questions] by method; misled, hidden: bool [questions], of the truth."""

    cell: Cell
    ids: list[str]
    images: list[str]
    misled: np.ndarray
    hidden: np.ndarray
    right: dict[str, np.ndarray]


def read(cell: Cell, work: Path) -> Answers | None:
    """Return a finished cell's answers."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = work / cell.name / "results" / "evidence" / "scores.parquet"
    if not path.exists():
        return None
    truth = pq.read_table(work / cell.world / "truth.parquet", columns=["query", "level", "hidden"]).to_pylist()
    level, hides = ({row["query"]: row[name] for row in truth} for name in ("level", "hidden"))
    asked = pq.read_table(next((work / cell.name / "results" / "evaluate").glob("*/questions.parquet"))).to_pylist()
    place = {row["question_id"]: number for number, row in enumerate(asked)}
    scores = pq.read_table(path, columns=["method", "question_id", "score"])
    right: dict[str, np.ndarray] = {}
    for method in dict.fromkeys(scores["method"].to_pylist()):
        own = scores.filter(pc.equal(scores["method"], method))
        right[method] = np.zeros(len(asked), bool)
        right[method][[place[key] for key in own["question_id"].to_pylist()]] = own["score"].to_numpy() >= 0.5
    images = [row["image"] for row in asked]
    misled = np.array([level[image] < cell.share for image in images])
    hidden = np.array([row["question"].split()[3] in hides[row["image"]] for row in asked])
    return Answers(cell, list(place), images, misled, hidden, right)


def kept(out: Path) -> list[Answers]:
    """Return the answers that earlier calls wrote to `out`, perhaps on other machines."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if not (out / "right.parquet").exists():
        return []
    questions, answered = (pq.read_table(out / f"{name}.parquet") for name in ("questions", "right"))
    found = []
    for name in dict.fromkeys(questions["cell"].to_pylist()):
        labels, share, seed = name.rsplit("-", 2)
        asked = questions.filter(pc.equal(questions["cell"], name)).to_pydict()
        own = answered.filter(pc.equal(answered["cell"], name))
        methods = dict.fromkeys(own["method"].to_pylist())
        right = {one: np.array(own.filter(pc.equal(own["method"], one))["right"]) for one in methods}
        truth = np.array(asked["misled"]), np.array(asked["hidden"])
        cell = Cell(float(share), int(seed), labels)
        found.append(Answers(cell, asked["question_id"], asked["image"], *truth, right))
    return found


def keep(cells: Sequence[Cell], work: Path, out: Path) -> int:
    """Write questions.parquet and right.parquet: the answers of all finished cells, beside those that `out` holds already.
    Returns how many cells they hold."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = [one for cell in cells if (one := read(cell, work)) is not None]
    fresh = {one.cell for one in found}
    found = sorted([*found, *(one for one in kept(out) if one.cell not in fresh)], key=lambda one: one.cell.name)
    questions: list[pa.Table] = []
    right: list[pa.Table] = []
    for one in found:
        size = len(one.ids)
        about = {"question_id": one.ids, "image": one.images, "misled": one.misled, "hidden": one.hidden}
        questions.append(pa.table({"cell": [one.cell.name] * size, **about}))
        for name, rows in one.right.items():
            right.append(pa.table({"cell": [one.cell.name] * size, "method": [name] * size, "right": rows}))
    if found:
        out.mkdir(parents=True, exist_ok=True)
        for name, parts in (("questions", questions), ("right", right)):
            pq.write_table(pa.concat_tables(parts), out / f"{name}.parquet", compression="zstd")
    return len(found)


def measure(found: Sequence[Answers], resamples: int = 2000) -> Iterator[Row]:
    """Yield accuracies and paired differences: of each cell and of all seeds together, of all questions and of parts of them.

    Intervals are 95 %, of a bootstrap of images; p is McNemar's with images as units, of all seeds together.
    """
    groups: dict[tuple[str, float, str], list[Answers]] = {}
    for one in found:
        for seed in ("all", str(one.cell.seed)):
            groups.setdefault((one.cell.labels, one.cell.share, seed), []).append(one)
    for (labels, share, seed), some in groups.items():
        images = [f"{one.cell.seed}/{image}" for one in some for image in one.images]
        misled, hidden = (np.concatenate([getattr(one, name) for one in some]) for name in ("misled", "hidden"))
        methods = [name for name in some[0].right if all(name in one.right for one in some)]
        right = {name: np.concatenate([one.right[name] for one in some]) for name in methods}
        for part, rows in {"all": misled | True, "helps": ~misled, "misleads": misled, "hidden": hidden}.items():
            if not rows.any():
                continue
            pairs = [(name, other) for name in methods for other in OTHERS if other in right and other != name]
            keys: list[tuple[str, str | None]] = [(name, None) for name in methods]
            keys += pairs
            numbers = {name: own[rows].astype(np.int64) for name, own in right.items()}
            changes = np.stack([numbers[name] - (numbers[other] if other else 0) for name, other in keys], axis=1)
            clusters = [image for image, of in zip(images, rows, strict=True) if of]
            rated = intervals.ratios(changes.astype(float), np.ones(changes.shape), clusters, resamples, 0)
            for column, ((name, other), value) in enumerate(zip(keys, rated, strict=True)):
                row = {"labels": labels, "share": share, "seed": seed, "part": part, "method": name, "against": other}
                p = intervals.mcnemar(changes[:, column], clusters) if other and seed == "all" else None
                yield {**row, **value._asdict(), "p": p, "questions": int(rows.sum()), "seeds": len(some)}


class Lookup:
    """Measures of all seeds together, by labels, share, part, method and method compared with."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {(r["labels"], r["share"], r["part"], r["method"], r["against"]): r for r in rows if r["seed"] == "all"}

    def estimate(self, *key: Any) -> intervals.Estimate | None:
        row = self.rows.get(key)
        return row and intervals.Estimate(row["value"], row["low"], row["high"])

    def text(self, *key: Any) -> str:
        """Value and interval in percent, of a difference in points with its sign; empty where there is none."""
        found = self.estimate(*key)
        return tables.percent(found, sign=key[-1] is not None) if found else ""


def markdown(rows: Sequence[Row]) -> str:
    """Return the tables as text."""
    look = Lookup(rows)
    lines = ["# The controlled experiment", ""]
    for labels in sorted({row["labels"] for row in rows}):
        own = [row for row in look.rows.values() if row["labels"] == labels]
        shares = sorted({row["share"] for row in own})
        methods = list(dict.fromkeys(row["method"] for row in own))
        head = ["Method", *(f"{share:g} mislead" for share in shares)]
        seeds = ", ".join(
            f"{share:g} mislead: {next(row['seeds'] for row in own if row['share'] == share)} seeds" for share in shares
        )
        for part in ("all", "helps", "misleads"):  # of the hidden things all are there: a model that says yes is right
            body = [[name, *(look.text(labels, share, part, name, None) for share in shares)] for name in methods]
            lines += [
                f"## Accuracy (%), labels by {labels}, questions: {part}",
                "",
                f"{seeds}.",
                "",
                tables.table(head, body),
                "",
            ]
        for part, others in (("all", OTHERS), ("misleads", OTHERS[:1]), ("helps", OTHERS[1:2])):
            for other in others:
                body = [
                    [name, *(look.text(labels, share, part, name, other) for share in shares)]
                    for name in methods
                    if name != other
                ]
                title = f"## Minus {other} (points), labels by {labels}, questions: {part}"
                lines += [title, "", tables.table(head, body), ""]
    return "\n".join([*lines, "## Goals", "", *goals(look)]) + "\n"


def goals(look: Lookup) -> Iterator[str]:
    """What the experiment was to show, and whether it does, a line for each."""
    for name, share in product(OURS, sorted({key[1] for key in look.rows if key[0] == "answer"})):
        ours = look.estimate("answer", share, "all", name, None)
        for other in OTHERS[:2]:
            theirs = look.estimate("answer", share, "all", other, None)
            if ours and theirs and ours.low is not None and theirs.high is not None:
                verdict = "above, intervals apart" if ours.low > theirs.high else "not above with intervals apart"
                yield f"- {share:g} mislead: {name} against {other}: {verdict}"
        loss = look.text("answer", share, "misleads", name, "zero-shot")
        yield f"- {share:g} mislead: {name} minus zero-shot where references mislead: {loss} points (goal: above -1)"


def draw(look: Lookup, path: Path) -> None:
    """Accuracy over the share of misleading references."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    shares = sorted({key[1] for key in look.rows if key[0] == "answer"})
    canvas = FigureCanvasSVG(Figure(figsize=(6, 3.5), layout="constrained"))
    axes = canvas.figure.subplots()
    for name, color in SHOWN.items():
        found = [(share, look.estimate("answer", share, "all", name, None)) for share in shares]
        points = [(share, one.value, one.low, one.high) for share, one in found if one]
        if points:
            place, value, low, high = np.array(points, float).T * 100
            axes.errorbar(
                place, value, [value - low, high - value], label=name, color=color, marker="o", markersize=3, capsize=2
            )
    axes.set_xticks([100 * share for share in shares])
    axes.set_xlabel("queries whose references mislead (%)")
    axes.set_ylabel("accuracy (%)")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    tables.save(canvas, path)


def write(out: Path) -> None:
    """Write tables.parquet, tables.md and shares.svg from the answers in `out`.

    Raises:
        SurfError: there are none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = kept(out)
    if not found:
        raise SurfError("there are no answers", where=str(out), expected="right.parquet", next="run benchmarks/experiment.py")
    rows = list(measure(found))
    pq.write_table(pa.Table.from_pylist(rows), out / "tables.parquet", compression="zstd")
    (out / "tables.md").write_text(markdown(rows))
    draw(Lookup(rows), out / "shares.svg")
    print(f"tables of {len(found)} cells: {out / 'tables.md'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder with questions.parquet and right.parquet")
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
