"""How fast the stages are: measures, and the calibration file that keeps them. `finished` reads them from a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from surf.config import Config
from surf.errors import SurfError

_ALONE = 0.3  # assumed spread (standard deviation of the logarithm) of a figure that was measured once
_LEAST = 0.03  # no figure is taken to be more certain than this

_DECIDE = {
    "embed": ["model", "pretrained", "batch_size", "precision", "workers"],
    "lvlm": ["model", "dtype", "layout", "caption_chars", "batch_tokens", "batch_size"],
    "answer": ["max_new_tokens", "gold_loglik"],
    "reanswer": ["references", "stop_early"],
    "score": ["judge", "bertscore_model", "bertscore_layer"],
    "finetune": ["processes", "nodes", "batch_size", "accumulation", "train", "zero_stage", "gradient_checkpointing"],
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

    Keys are rule names, with what else their speed depends on: "score/answers", "evaluate_answer/TASK/N" for N references,
    "evaluate_candidates/BY/TASK", "evaluate_retrieve/TASK", "finetune/VARIANT"; "search" is one query against a million
    vectors. A row's seconds are those of one worker on one GPU. Shares: "wrong" [wrong rounds, judged rounds]; "pairs"
    [rounds with both kinds of references, re-answered rounds]; "asked": references for a re-answered round, one a part.
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


def of_figures(figures: Sequence[Mapping[str, float]], source: str) -> Stage:
    """The rates of parts, from their telemetry (`surf.telemetry.figures`). Those of several workers count as one's."""
    if not figures:
        return Stage()
    rows = Measure(tuple(one["work_seconds"] * one["workers"] / one["rows"] for one in figures), source)
    return Stage(rows, Measure(tuple(one["start_seconds"] for one in figures), source))


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
    found = {f"{section}.{key}": values[section][key] for section, keys in _DECIDE.items() for key in keys}
    tasks = {f"evaluate.tasks.{name}.max_new_tokens": task.max_new_tokens for name, task in cfg.evaluate.tasks.items()}
    return {**found, **tasks}
