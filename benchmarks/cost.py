"""What a run costs on 1, 8 and 50 GPUs, from measured rates and the sizes of data that need not be there.

    python benchmarks/cost.py --configfile configs/llava-1.5-7b.yaml --data data.json --rates calibration.json [--gpus 1 8 50]

`surf.check` plans a run whose data are at hand; this is for a page of documentation. data.json says how many rows there are;
images that the corpus lacks are `fresh`:

    {"pairs": 0, "rounds": 0, "images": 0, "fresh": 0,
     "tasks": {"pope": {"questions": 0, "prompts": 0, "images": 0, "fresh": 0}}}

calibration.json is what `python -m surf.calibrate` writes; figures of the benchmarks may be put into one by hand. A task that
data.json does not name, and a variant that --leave-out names, are not run.
"""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surf import config, plan, planevaluate, plantable, rates, tables
from surf.errors import SurfError

CORES = 16  # of a GPU


def data_of(content: Mapping[str, Any], where: str) -> plan.Data:
    """The sizes that stand in data.json.

    Raises:
        SurfError: a number is missing.
    """
    try:
        sizes = {name: int(content[name]) for name in ("pairs", "rounds", "images", "fresh")}
        tasks = {
            name: planevaluate.Task(*(int(task[key]) for key in ("questions", "prompts", "images", "fresh")), text_bytes=0)
            for name, task in content["tasks"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SurfError(f"is not complete ({error!r})", where=where, expected="the keys that --help shows") from None
    return plan.Data(**sizes, corpus_bytes=0, rounds_bytes=0, tasks=tasks, read_seconds={})


def narrowed(cfg: config.Config, tasks: Sequence[str], left_out: Sequence[str], gpus: int) -> config.Config:
    """The config with just these tasks, without these variants, and with a fine-tune that fits on so many GPUs."""
    content = cfg.model_dump(mode="json")
    content["variants"] = {name: value for name, value in content["variants"].items() if name not in left_out}
    evaluate, finetune = content["evaluate"], content["finetune"]
    evaluate["tasks"] = {name: value for name, value in evaluate["tasks"].items() if name in tasks}
    evaluate["methods"] = {name: value for name, value in evaluate["methods"].items() if value["model"] not in left_out}
    fits = min(finetune["processes"], gpus)
    finetune.update(processes=fits, accumulation=finetune["accumulation"] * finetune["processes"] // fits)
    return config.Config.model_validate(content)


def cost(
    cfg: config.Config, data: plan.Data, known: rates.Rates, gpus: Sequence[int], left_out: Sequence[str] = ()
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: GPU-hours of every stage, and its wall time on each number of GPUs; the last row is the whole.

    Raises:
        SurfError: a stage that needs a GPU has no rate.
    """
    plans = [
        plan.plan(narrowed(cfg, list(data.tasks), left_out, count), data, plan.Sizes(), known, gpus=count, cores=CORES * count)
        for count in gpus
    ]
    for one in plans:
        if one.wall_seconds is None or one.gpu_hours is None:
            raise SurfError(f"no rate for {', '.join(one.unknown)}", where="--rates", expected="seconds a row of every stage")
    head = ["stage", "rows", "GPU-hours", *(f"wall, {count} GPU{'s' * (count > 1)}" for count in gpus)]
    rows = []
    for lines in zip(*(one.lines for one in plans), strict=True):
        hours = "" if lines[0].gpu_hours is None else plantable.number(lines[0].gpu_hours)
        walls = [plantable.time(line.wall_seconds) for line in lines]
        rows.append([lines[0].stage, f"{lines[0].rows:,}" if lines[0].rows else "", hours, *walls])
    rows.append(["all, and 90 %", "", _band(plans[0].gpu_hours, plantable.number)])
    rows[-1] += [_band(one.wall_seconds, plantable.time) for one in plans]
    return head, rows


def _band(values: tuple[float, float, float] | None, text: Any) -> str:
    low, middle, high = values or (0.0, 0.0, 0.0)
    return f"{text(middle)} ({text(low)} to {text(high)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configfile", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="JSON with the numbers of rows")
    parser.add_argument("--rates", type=Path, required=True, help="a calibration file")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 50])
    parser.add_argument("--leave-out", nargs="*", default=[], help="variants that are not run")
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    data = data_of(json.loads(args.data.read_text()), str(args.data))
    known = rates.of_json(json.loads(args.rates.read_text()), args.rates)
    head, rows = cost(config.load(args.configfile), data, known, args.gpus, args.leave_out)
    print(tables.table(head, rows, right=range(1, len(head)), padded=True))


if __name__ == "__main__":
    main()
