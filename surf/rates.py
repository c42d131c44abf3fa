"""How fast the stages are: read from a calibration file, and from the telemetry of finished parts."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from surf import store
from surf.config import Config
from surf.errors import SurfError

_STEP = re.compile(r"^\d\d:\d\d:\d\d step \d+/\d+ .* ([\d.]+) samples/s", re.M)  # a line of `finetune`'s log
_ALONE = 0.3  # assumed spread (standard deviation of the logarithm) of a figure that was measured once
_LEAST = 0.03  # no figure is taken to be more certain than this

_DECIDE = {
    "embed": ["model", "pretrained", "batch_size", "precision", "workers"],
    "lvlm": ["model", "dtype", "layout", "caption_chars", "batch_tokens", "batch_size"],
    "answer": ["max_new_tokens", "gold_loglik"],
    "reanswer": ["references", "stop_early"],
    "score": ["judge", "bertscore_model", "bertscore_layer"],
    "finetune": ["processes", "nodes", "batch_size", "accumulation", "train", "zero_stage", "gradient_checkpointing"],
    "pope": ["max_new_tokens"],
}


class Measure(NamedTuple):
    """One quantity (seconds, or a ratio), measured several times."""

    values: tuple[float, ...]
    source: str

    @property
    def typical(self) -> float:
        """Geometric mean."""
        return float(np.exp(np.mean(np.log(self._positive()))))

    def draw(self, rng: np.random.Generator) -> float:
        """A value that the next measurement might give: log-normal, with Student's t for the few values."""
        logs = np.log(self._positive())
        count = len(logs)
        spread = max(_LEAST, float(np.std(logs, ddof=1))) if count > 1 else _ALONE
        step = rng.standard_t(count - 1) if count > 2 else rng.standard_normal() * (1.5 if count == 2 else 1.0)
        return float(np.exp(np.mean(logs) + spread * np.sqrt(1 + 1 / count) * np.clip(step, -4, 4)))

    def _positive(self) -> np.ndarray:
        return np.maximum(np.asarray(self.values, float), 1e-9)


class Stage(NamedTuple):
    """Seconds a row, and seconds of a job before its first row (interpreter, imports, models)."""

    row: Measure | None = None
    start: Measure | None = None


class Rates(NamedTuple):
    """What is known of each stage, by key, and the shares that make the number of rows.

    Keys are rule names; score is "score/answers" and "score/reanswers", pope_answer is "pope_answer/N" for N references, and
    "search" is one query against a million vectors. Shares: "wrong" [wrong rounds, judged rounds]; "pairs" [rounds with
    both kinds of references, re-answered rounds]; "asked": references asked for a wrong round, one value a part.
    """

    stages: Mapping[str, Stage] = MappingProxyType({})
    wrong: tuple[int, int] | None = None
    pairs: tuple[int, int] | None = None
    asked: Measure | None = None

    def over(self, other: "Rates") -> "Rates":
        """These, and what only `other` knows."""
        stages = dict(other.stages)
        for key, stage in self.stages.items():
            below = other.stages.get(key, Stage())
            stages[key] = Stage(stage.row or below.row, stage.start or below.start)
        return Rates(stages, self.wrong or other.wrong, self.pairs or other.pairs, self.asked or other.asked)


def of_results(cfg: Config, source: str = "finished parts") -> Rates:
    """The rates of finished parts below `cfg.results`, from their telemetry; and shares, from finished scores."""
    results = Path(cfg.results)
    folders = {
        "embed": "embeddings",
        "answer": "answers",
        "score/answers": "scores/answers",
        "reanswer": "reanswers",
        "score/reanswers": "scores/reanswers",
    }
    stages = {key: _stage(_figures(results / folder), source) for key, folder in folders.items()}
    by_references: dict[int, list[dict[str, float]]] = {}
    for name, method in cfg.pope.methods.items():
        by_references.setdefault(method.references, []).extend(_figures(results / "pope" / name))
    stages.update({f"pope_answer/{count}": _stage(found, source) for count, found in by_references.items()})
    loading = stages["embed"].start
    for key, folder in {"retrieve": "neighbors", "pope_retrieve": "pope/neighbors"}.items():
        # It embeds the images that the corpus lacks before its clock says "loaded": what a start of `embed` takes is its start
        # too, the rest is work.
        figures = _figures(results / folder)
        totals = [one["start_seconds"] + one["work_seconds"] for one in figures]
        if loading and totals:
            base = min(loading.typical, *totals)
            rows = tuple((total - base) / one["rows"] for total, one in zip(totals, figures, strict=True))
            stages[key] = Stage(Measure(rows, source), Measure((base,), source))
    stages["finetune"] = _training(results, source)
    wrong, asked = _shares(results, source)
    pairs = _pairs(results)
    return Rates({key: stage for key, stage in stages.items() if stage.row or stage.start}, wrong, pairs, asked)


def to_json(rates: Rates) -> dict[str, Any]:
    """As it stands in a calibration file."""
    stages = {
        key: {name: list(part.values) for name, part in stage._asdict().items() if part} for key, stage in rates.stages.items()
    }
    asked = list(rates.asked.values) if rates.asked else None
    return {"stages": stages, "shares": {"wrong": rates.wrong, "pairs": rates.pairs, "asked": asked}}


def of_json(content: Mapping[str, Any], path: Path) -> Rates:
    """The rates of a calibration file.

    Raises:
        SurfError: it is none.
    """
    try:
        stages = {
            key: Stage(**{name: Measure(tuple(map(float, values)), "calibration") for name, values in stage.items() if values})
            for key, stage in content["stages"].items()
        }
        shares = content["shares"]
        asked = Measure(tuple(shares["asked"]), "calibration") if shares["asked"] else None
        pairs = {name: tuple(shares[name]) if shares[name] else None for name in ("wrong", "pairs")}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        again = f"python -m surf.calibrate --configfile … --out {path}"
        raise SurfError(f"is no calibration file ({error!r})", where=str(path), next=again) from None
    return Rates(stages, pairs["wrong"], pairs["pairs"], asked)


def place(cfg: Config) -> Path:
    """Where a calibration file is looked for if no other place is named."""
    return Path(cfg.results) / "calibration.json"


def settings(cfg: Config) -> dict[str, Any]:
    """The settings that rates depend on, by key."""
    values = cfg.model_dump(mode="json", include=set(_DECIDE))
    return {f"{section}.{key}": values[section][key] for section, keys in _DECIDE.items() for key in keys}


# --- what finished parts left behind ----------------------------------------------------------------------------------


def _figures(folder: Path) -> list[dict[str, float]]:
    """Telemetry of the parts in `folder` that are still there and have rows."""
    found = []
    for path in sorted(folder.glob("_telemetry/*.json")):
        if (folder / f"{path.stem}.parquet").exists():
            one = store.read_json(path)
            if one.get("rows") and one.get("work_seconds"):
                found.append({"start_seconds": one.get("load_seconds", 0.0), **one})
    return found


def _stage(figures: Sequence[Mapping[str, float]], source: str) -> Stage:
    if not figures:
        return Stage()
    rows = Measure(tuple(one["work_seconds"] / one["rows"] for one in figures), source)
    return Stage(rows, Measure(tuple(one["start_seconds"] for one in figures), source))


def _training(results: Path, source: str) -> Stage:
    """Samples a second of the last training, from its log: over all its processes, and from its first step on."""
    path = results / "logs/finetune/finetune.log"
    found = _STEP.findall(path.read_text(errors="replace")) if path.exists() else []
    rates = [float(rate) for rate in found[len(found) // 2 :] if float(rate)]  # the first steps are slow
    return Stage(Measure((1 / rates[-1],), source)) if rates else Stage()


def _shares(results: Path, source: str) -> tuple[tuple[int, int] | None, Measure | None]:
    """(wrong and judged rounds, references asked for a wrong round) of the parts that are there."""
    wrong = judged = 0
    asked = []
    for path in sorted((results / "scores/answers").glob("*.parquet")):
        column = store.read_table(path, "scores/answers", ["correct"])["correct"]
        bad = column.to_pylist().count(False)
        wrong, judged = wrong + bad, judged + len(column)
        again = results / "reanswers" / path.name
        if bad and again.exists():
            asked.append(store.footer(again)[0].num_rows / bad)
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
    return int(labelled.get("positive True, negative True", 0)), max(1, sum(labelled.values()))
