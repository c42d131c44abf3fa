"""Write one self-contained HTML page about a run: funnel, POPE table, sample pairs, rescues and harms, loss, quarantine.

    python -m surf.report --rounds M --answers M --scores-answers M --reanswers M --scores-reanswers M --catalog M \\
        --pairs results/pairs.parquet --metrics results/pope/metrics.parquet \\
        --pope-answers results/evaluate/pope/answers/*/_manifest.json \\
        --model results/model/model.json --out results/report.html FLAGS        (M: the datasets' manifests)

The page loads nothing from anywhere: images are data URIs, charts are SVG, there is no script. Captions and questions come
from outside, so every value is escaped by the template engine and nothing is ever marked as safe.
"""

import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from surf import __version__, cli, config, pages, pope, store
from surf import score as judge
from surf.errors import SurfError
from surf.images import Images
from surf.methods import Method
from surf.metrics import HEADLINE, METRICS, verdict
from surf.popetable import BLIND, MEAN, differences
from surf.prompts import Reference
from surf.reanswer import lookup

# step: the step that its share refers to
STEPS = {"rounds": "", "answered": "rounds", "wrong": "answered", "reanswered": "answered"}
STEPS |= {"positive": "reanswered", "negative": "reanswered", "both": "reanswered", "pairs": "both"}
SHARDED = ("rounds", "answers", "scores/answers", "reanswers", "scores/reanswers")
TASKS = ("choice", "short", "box", "caption", "open")
MAX_FLIPS, MAX_QUARANTINE, MAX_POINTS = 6, 12, 400
Row = dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """Where the results lie: manifests of the sharded datasets, and single files."""

    rounds: Path
    answers: Path
    scores_answers: Path
    reanswers: Path
    scores_reanswers: Path
    pairs: Path
    metrics: Path | None
    pope_answers: Sequence[Path] = ()
    catalog: Path | None = None
    model: Path | None = None
    quarantine: Sequence[Path] = ()
    methods: Sequence[str] = ()
    baseline: str = "zero-shot"
    tuned: str = "surf"
    resamples: int = 2000
    seed: int = 0

    def sharded(self) -> dict[str, Path]:
        """Manifest by dataset, in the order of `SHARDED`."""
        return {name: getattr(self, name.replace("/", "_")) for name in SHARDED}

    def shards(self) -> Iterator[tuple[Path, ...]]:
        """The parts of all sharded datasets, shard by shard: shard i holds the same rounds in each of them."""
        parts = {name: store.parts_of(path, name) for name, path in self.sharded().items()}
        if len({len(each) for each in parts.values()}) > 1:
            found = ", ".join(f"{name} {len(each)}" for name, each in parts.items())
            raise SurfError(f"the numbers of shards differ: {found}", where=str(self.rounds), next="run snakemake again")
        return zip(*parts.values(), strict=True)


def report(inputs: Inputs, options: config.Report, score: config.Score, images: Images) -> str:
    """The whole page as text; equal results give an equal page."""
    inputs = compared(inputs)
    return pages.render(
        "report.html.jinja",
        version=__version__,
        baseline=inputs.baseline,
        tuned=inputs.tuned,
        thumb=pages.thumbnailer(images),
        funnel=funnel(inputs, score),
        pope=scores(inputs),
        samples=samples(inputs, options.samples),
        flips=flips(inputs, min(options.samples, MAX_FLIPS)),
        model=model(inputs.model),
        quarantine=quarantine(inputs.quarantine),
        settings=settings(inputs),
    )


def compared(inputs: Inputs) -> Inputs:
    """The same; a method that no answers are of is replaced by what it stands for, by the first of `methods` that fits.

    The baseline is the base model without references. The tuned method is the tuned model, with references if one has them;
    else another model, else any other method.
    """
    metas = [store.footer(path)[1] for path in store.files_of(inputs.pope_answers, "evaluate/answers")]
    found = {meta["method"]: Method.model_validate_json(meta["how"]) for meta in metas if "how" in meta}
    hows = {name: found[name] for name in dict.fromkeys([*inputs.methods, *found]) if name in found}

    def choose(name: str, other: str, *tests: Callable[[Method], bool]) -> str:
        if name in {meta["method"] for meta in metas}:
            return name
        return next((key for test in tests for key, how in hows.items() if key != other and test(how)), name)

    baseline = choose(inputs.baseline, inputs.tuned, lambda how: how.model == "base" and not how.references)
    tuned = choose(
        inputs.tuned,
        baseline,
        lambda how: how.model == "tuned" and how.references > 0,
        lambda how: how.model == "tuned",
        lambda how: how.model != "base",
        lambda how: True,
    )
    return replace(inputs, baseline=baseline, tuned=tuned)


# --- the sections -----------------------------------------------------------------------------------------------------


def funnel(inputs: Inputs, score: config.Score) -> Row:
    """How many rounds reach each step, by task and in total. One shard is in memory at a time."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for rounds, answers, scores, reanswers, rescores in inputs.shards():
        table = store.read_table(rounds, "rounds", ["round_id", "task"])
        tasks = dict(zip(*(table[name].to_pylist() for name in ("round_id", "task")), strict=True))
        first = {row["round_id"]: row for row in store.rows(store.read_table(scores, "scores/answers"))}
        labels = defaultdict(set)
        for row in store.rows(store.read_table(rescores, "scores/reanswers")):
            before = first[row["round_id"]]
            found = judge.label(row["metric"], row["score"], row["correct"], before["score"], before["correct"] is True, score)
            labels[row["round_id"]].add(found)
        reached = {
            "rounds": set(tasks),
            "answered": set(store.read_table(answers, "answers", ["round_id"])["round_id"].to_pylist()),
            "wrong": {key for key, row in first.items() if row["correct"] is False},
            "undecided": {key for key, row in first.items() if row["correct"] is None},
            "reanswered": set(store.read_table(reanswers, "reanswers", ["round_id"])["round_id"].to_pylist()),
            "positive": {key for key, found in labels.items() if True in found},
            "negative": {key for key, found in labels.items() if False in found},
            "both": {key for key, found in labels.items() if {True, False} <= found},
        }
        for step, keys in reached.items():
            if strange := keys - tasks.keys():
                raise SurfError(f"{step}: round {min(strange)!r} is not in this shard of the rounds", where=str(rounds))
            counts[step].update(tasks[key] for key in keys)
    samples = store.rows(store.read_table(inputs.pairs, "pairs", ["task", "kind"]))
    counts["pairs"].update(row["task"] for row in samples if row["kind"] == "pair")
    steps = {}
    for name, of in STEPS.items():
        total, base = counts[name].total(), counts[of].total() if of else 0
        steps[name] = {"of": of, "total": total, "share": total / base if base else None, "tasks": counts[name]}
    shown = [task for task in TASKS if counts["rounds"][task]]
    other = len(samples) - counts["pairs"].total()
    return {"steps": steps, "tasks": shown, "undecided": counts["undecided"].total(), "other_samples": other}


def scores(inputs: Inputs) -> Row:
    """The metrics by method, split, rule and metric, in the order of the file, and the chart's axis."""
    rows = store.rows(store.read_table(inputs.metrics, "pope/metrics")) if inputs.metrics else []
    cells = {(row["method"], row["split"], row["rule"], row["metric"]): row for row in rows}
    methods, splits, rules = (list(dict.fromkeys(row[key] for row in rows)) for key in ("method", "split", "rule"))
    methods.sort(key=lambda name: name == BLIND)
    splits.sort(key=lambda name: name == MEAN)
    rules.sort(key=lambda name: name != HEADLINE)
    drawn = [row for key, row in cells.items() if key[2:] == (HEADLINE, "accuracy")]
    ends = [end for row in drawn for end in (row["low"], row["value"], row["high"]) if end is not None]
    low = math.floor(20 * min(ends, default=0)) / 20
    high = max(math.ceil(20 * max(ends, default=1)) / 20, low + 0.05)
    every = 1 if high - low < 0.3 else 2
    return {
        **{"cells": cells, "methods": methods, "rules": rules, "metrics": METRICS, "headline": HEADLINE, "blind": BLIND},
        **{"splits": splits[:1] if len(splits) == 2 else splits},  # the mean of one split says nothing
        "questions": {row["split"]: row["questions"] for row in rows},
        "ticks": [tick / 20 for tick in range(round(20 * low), round(20 * high) + 1) if tick % every == 0],
        "place": lambda value: f"{100 * (value - low) / (high - low):.2f}%",
    }


def flips(inputs: Inputs, count: int) -> Row:
    """POPE questions that the tuned method answers right and the baseline wrong (rescued), and the other way round (harmed)."""
    runs = pope.read_runs(inputs.pope_answers)
    runs = {name: runs[name] for name in (inputs.baseline, inputs.tuned) if name in runs}
    deltas = differences(runs, inputs.resamples, inputs.seed) if len(runs) == 2 else []
    # by split and question: several POPE tasks have the same numbers
    before, after = (
        {(split, row["question_id"]): row for split, rows in runs.get(name, {}).items() for row in rows}
        for name in (inputs.baseline, inputs.tuned)
    )
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    groups: dict[str, dict[str, tuple[str, str]]] = {"rescued": {}, "harmed": {}}
    for key in sorted(before.keys() & after.keys()):
        was, now = (verdict(side[key]["response"]) is side[key]["label"] for side in (before, after))
        kind = {(True, True): "both", (False, True): "rescued", (True, False): "harmed", (False, False): "neither"}[was, now]
        counts[key[0]][kind] += 1
        if kind in groups:  # one question may stand in several splits: show it once
            groups[kind].setdefault(f"{after[key]['image']}\n{after[key]['question']}", key)
    chosen = {kind: [keys[text] for text in pages.stable(keys, count)] for kind, keys in groups.items()}
    shown = {key: after[key] | {"before": before[key]["response"]} for keys in chosen.values() for key in keys}
    wanted = {image_id for row in shown.values() for image_id in row["references"] or []}
    known: dict[int, Reference] = lookup(inputs.catalog, wanted) if inputs.catalog and wanted else {}
    for row in shown.values():
        row["pairs"] = [known[image_id] for image_id in row["references"] or [] if image_id in known]
    delta = deltas[0][2] if deltas else None
    return {"counts": counts, "delta": delta} | {kind: [shown[key] for key in keys] for kind, keys in chosen.items()}


def samples(inputs: Inputs, count: int) -> list[Row]:
    """Some training samples, each with "said": the response by reference, and the first answer under None."""
    keys = pages.stable(store.read_table(inputs.pairs, "pairs", ["round_id"])["round_id"].to_pylist(), count)
    chosen = pa.array(keys, pa.string())

    def rows(path: Path, dataset: str, columns: list[str] | None = None) -> list[Row]:
        table = store.read_table(path, dataset, columns)
        return store.rows(table.filter(pc.is_in(table["round_id"], value_set=chosen)))

    found = {row["round_id"]: row | {"said": {}} for row in rows(inputs.pairs, "pairs")} if keys else {}
    for _, answers, _, reanswers, _ in inputs.shards() if keys else ():
        for path, dataset in ((answers, "answers"), (reanswers, "reanswers")):
            for row in rows(path, dataset, ["round_id", "image_id", "response"]):
                found[row["round_id"]]["said"][row["image_id"]] = row["response"]
    return [found[key] for key in keys]


def model(path: Path | None) -> Row:
    """The loss curve in percent of the chart's box, and the plain values of model.json. All of it may be missing."""
    content = store.read_json(path) if path else {}
    facts = {key: value for key, value in sorted(content.items()) if isinstance(value, str | int | float)}
    curve = [(row["step"], row["loss"]) for row in content.get("loss_curve") or [] if math.isfinite(row["loss"])]
    if not curve:
        return {"facts": facts, "points": ""}
    curve = curve[: -1 : math.ceil(len(curve) / MAX_POINTS)] + curve[-1:]
    (start, first), (end, last) = curve[0], curve[-1]
    top = max(loss for _, loss in curve) * 1.05 or 1.0
    points = " ".join(f"{100 * (x - start) / max(end - start, 1):.2f},{100 - 100 * y / top:.2f}" for x, y in curve)
    return {"facts": facts, "points": points, "start": start, "end": end, "first": first, "last": last, "top": top}


def quarantine(paths: Sequence[Path]) -> Row:
    """Counts by stage and dataset, and the first rows."""
    rows = [row for path in paths for row in store.rows(store.read_table(path, "quarantine"))]
    rows.sort(key=lambda row: (row["stage"], row["dataset"], row["key"]))
    return {
        "counts": Counter((row["stage"], row["dataset"]) for row in rows),
        "total": len(rows),
        "rows": rows[:MAX_QUARANTINE],
    }


def settings(inputs: Inputs) -> Row:
    """Rows, parts and flags of each sharded dataset, as its first part remembers them, and the model's name."""
    datasets, name = [], ""
    for dataset, path in inputs.sharded().items():
        parts = store.parts_of(path, dataset)
        flags = store.footer(parts[0])[1].get("flags", "") if parts else ""
        datasets.append({"name": dataset, "rows": store.read_json(path)["rows"], "parts": len(parts), "flags": flags})
        name = next((word.partition("=")[2] for word in shlex.split(flags) if word.startswith("--lvlm.model=")), name)
    return {"datasets": datasets, "model": name}


def main() -> None:
    """Command line."""
    one, many = {"type": Path}, {"type": Path, "nargs": "*", "default": ()}
    args = cli.parse(
        None,
        prog="report",
        about=__doc__ or "",
        sections=["report", "score", "images"],
        paths=["rounds", "answers", "scores_answers", "reanswers", "scores_reanswers", "pairs", "out"],
        extras={
            "metrics": {**one, "nargs": "?", "help": "pope/metrics; shows the POPE scores"},
            "pope_answers": {**many, "help": "evaluate/answers to POPE tasks, or their manifests"},
            "catalog": {**one, "help": "manifest; shows the references of POPE questions"},
            "model": {**one, "help": "model.json; shows the loss curve"},
            "quarantine": {**many, "help": "files of quarantine"},
            "methods": {"nargs": "*", "default": (), "help": "order of the methods, of which the first that fits is compared"},
            "baseline": {"default": "zero-shot", "help": "POPE method that rescues and harms start from; see `compared`"},
            "tuned": {"default": "surf", "help": "POPE method that rescues and harms lead to"},
            "resamples": {"type": int, "default": 2000, "help": "as evaluate.resamples"},
            "seed": {"type": int, "default": 0},
        },
    )
    inputs = Inputs(**{field.name: getattr(args, field.name) for field in fields(Inputs)})
    images = Images(args.images.roots, args.images.max_pixels)
    store.write_text(args.out, report(inputs, args.report, args.score, images))


if __name__ == "__main__":
    cli.run(main)
