"""What a run costs, of data that are not there."""

import sys
from pathlib import Path

import pytest

from surf import config, rates
from surf.errors import SurfError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cost  # noqa: E402

TASK = {"questions": 300, "prompts": 200, "images": 50, "fresh": 50}
DATA = {"pairs": 100_000, "rounds": 10_000, "images": 4_000, "fresh": 1_000, "tasks": {"pope": TASK}}
STAGES = ["embed", "answer", "reanswer", "score/answers", "score/reanswers", "finetune", "search", "merge", "pair", "catalog"]
STAGES += ["build_index", "split", "pope", "evidence", "report"]
STAGES += [f"evaluate_answer/pope/{count}" for count in (0, 1, 2, 4)]
STAGES += [f"evaluate_candidates/{by}/pope" for by in ("caption", "relevance", "gold")]


def known(**seconds: float) -> rates.Rates:
    content = {name: {"row": [seconds.get(name, 0.01)], "start": [10.0]} for name in STAGES}
    shares = {"wrong": [200, 1000], "pairs": [50, 200], "asked": [3.0]}
    return rates.of_json({"stages": content, "shares": shares}, Path("calibration.json"))


def test_gpu_hours_are_rows_times_seconds_whatever_the_number_of_gpus() -> None:
    cfg = config.load(ROOT / "configs" / "llava-1.5-7b.yaml")
    head, rows = cost.cost(cfg, cost.data_of(DATA, "data.json"), known(embed=0.36), [1, 8])
    by_stage = {row[0]: row for row in rows}
    jobs = cfg.shards.corpus
    assert float(by_stage["embed"][2]) == pytest.approx((100_000 * 0.36 + jobs * 10) / 3600, abs=0.5)
    assert head[3:] == ["wall, 1 GPU", "wall, 8 GPUs"]
    assert by_stage["embed"][3].endswith("h") and by_stage["embed"][4].endswith("min")
    assert not any("mmstar" in row[0] for row in rows)


def test_what_is_missing_is_named() -> None:
    cfg = config.load(ROOT / "configs" / "llava-1.5-7b.yaml")
    with pytest.raises(SurfError, match="pairs"):
        cost.data_of({"rounds": 1}, "data.json")
    with pytest.raises(SurfError, match="embed"):
        cost.cost(cfg, cost.data_of(DATA, "data.json"), rates.Rates(), [1])
