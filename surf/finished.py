"""How fast the finished parts of a run were, and what they say of the shares that make the number of rows."""

import json
import re
from pathlib import Path

from surf import planevaluate, store, telemetry
from surf.config import Config, Finetune
from surf.rates import Measure, Rates, Stage, of_figures

_STEP = re.compile(r"^\d\d:\d\d:\d\d step \d+/\d+ .* ([\d.]+) samples/s", re.M)  # a line of `finetune`'s log


def read(cfg: Config, source: str = "finished parts") -> Rates:
    """The rates of finished parts below `cfg.results`, from their telemetry; and shares, from finished scores."""
    results = Path(cfg.results)
    folders = {
        "embed": "embeddings",
        "answer": "answers",
        "score/answers": "scores/answers",
        "reanswer": "reanswers",
        "score/reanswers": "scores/reanswers",
    }
    stages = {key: of_figures(telemetry.figures(results / folder), source) for key, folder in folders.items()}
    stages.update(planevaluate.finished(cfg, source))
    if loading := stages["embed"].start:
        stages["retrieve"] = _retrieval(telemetry.figures(results / "neighbors"), loading, source)
        for task in cfg.evaluate.tasks:
            figures = telemetry.figures(results / "evaluate" / task, "neighbors")
            stages[f"evaluate_retrieve/{task}"] = _retrieval(figures, loading, source)
    stages["finetune"] = _training(results, "finetune", cfg.finetune, source)
    for name in cfg.variants:
        stages[f"finetune/{name}"] = _training(results, name, cfg.variant(name)[1], source)
    wrong, asked = _shares(results, source)
    pairs = _pairs(results)
    return Rates({key: stage for key, stage in stages.items() if stage.row or stage.start}, wrong, pairs, asked)


def _retrieval(figures: list[dict[str, float]], loading: Measure, source: str) -> Stage:
    """It embeds the images that the corpus lacks before its clock says "loaded": what a start of `embed` takes is its start
    too, the rest is work."""
    totals = [one["start_seconds"] + one["work_seconds"] for one in figures]
    if not totals:
        return Stage()
    base = min(loading.typical, *totals)
    rows = tuple((total - base) / one["rows"] for total, one in zip(totals, figures, strict=True))
    return Stage(Measure(rows, source), Measure((base,), source))


def _training(results: Path, name: str, finetune: Finetune, source: str) -> Stage:
    """Seconds a sample and process of the last training, from its log, from its first step on."""
    path = results / f"logs/finetune/{name}.log"
    found = _STEP.findall(path.read_text(errors="replace")) if path.exists() else []
    rates = [float(rate) for rate in found[len(found) // 2 :] if float(rate)]  # the first steps are slow
    return Stage(Measure((finetune.processes * finetune.nodes / rates[-1],), source)) if rates else Stage()


def _shares(results: Path, source: str) -> tuple[tuple[int, int] | None, Measure | None]:
    """(wrong and judged rounds, references asked for a round that is asked again) of the parts that are there."""
    wrong = judged = 0
    asked = []
    for path in sorted((results / "scores/answers").glob("*.parquet")):
        column = store.read_table(path, "scores/answers", ["correct"])["correct"]
        wrong, judged = wrong + column.to_pylist().count(False), judged + len(column)
        part = results / "reanswers" / path.name
        if part.exists() and (again := store.read_table(part, "reanswers", ["round_id"])["round_id"]):
            asked.append(len(again) / len(again.unique()))
    return ((wrong, judged) if judged else None), (Measure(tuple(asked), source) if any(asked) else None)


def _pairs(results: Path) -> tuple[int, int] | None:
    """(pairs, re-answered rounds) of a finished `pairs`, from its metadata."""
    path = results / "pairs.parquet"
    if not path.exists():
        return None
    counts = store.footer(path)[1].get("counts")
    if not counts:
        return None

    labelled = json.loads(counts)
    both = sum(count for kind, count in labelled.items() if kind.startswith("positive True, negative True"))
    return both, max(1, sum(labelled.values()))
