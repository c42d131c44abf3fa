"""What a run will take: rows, jobs, GPU-hours, wall time and disk of every stage, with an error band.

A job takes `start + rows x seconds a row`. The wall time of the whole is that of a simulated run: jobs start as soon as their
inputs are there and a GPU and a core are free. The band (5th to 95th percentile) comes from many such runs, each with rates and
shares drawn anew from what the repeated measurements leave open.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from surf import planevaluate, plantable
from surf.config import Config
from surf.rates import Rates
from surf.rates import Stage as Rate
from surf.schedule import Stage, makespan

DRAWS = 200
TARGET = 2400  # seconds of a part; docs/usage.md: 20 to 60 minutes
SHORT, LONG = 1200, 3600
FILLING = ("embed", "answer", "reanswer", "evaluate_answer")  # one worker on each GPU that a job sees: `surf.workers`
_BLIND = (1, 2)  # of the rounds wrong, and so of anything else, if nobody has measured it


class Data(NamedTuple):
    """Rows of the user's data. Images of queries that the corpus lacks are `fresh`: they have to be embedded again."""

    pairs: int
    corpus_bytes: int
    rounds: int
    rounds_bytes: int
    images: int
    fresh: int
    tasks: Mapping[str, planevaluate.Task]
    read_seconds: Mapping[str, float]  # of stages that read the user's files: reading them once


class Sizes(NamedTuple):
    """Of the models: numbers in an embedding, parameters, parameters that are trained. 0: not known."""

    dim: int = 0
    parameters: int = 0
    trained: int = 0


class Line(NamedTuple):
    """A row of the table. Times are None where there are no rates."""

    stage: str
    rows: int
    jobs: int
    job_seconds: float | None
    gpu_hours: float | None
    wall_seconds: float | None
    disk_bytes: int
    source: str


class Plan(NamedTuple):
    """The table; and the whole run: (5th percentile, median, 95th percentile), None without rates."""

    lines: list[Line]
    wall_seconds: tuple[float, float, float] | None
    gpu_hours: tuple[float, float, float] | None
    disk_bytes: int
    unknown: list[str]  # stages without a rate
    notes: list[str]


def plan(
    cfg: Config, data: Data, sizes: Sizes, rates: Rates, *, gpus: int, cores: int, gpus_per_job: int = 1, draws: int = DRAWS
) -> Plan:
    """The plan for `gpus` GPUs and `cores` cores at a time.

    Args:
        gpus_per_job: GPUs that every GPU job holds; stages in `FILLING` use them all.
    """
    typical = stages(cfg, data, rates, None, gpus_per_job)
    room = disk(cfg, data, sizes, typical, gpus)
    lines = _lines(typical, room, gpus, cores)
    unknown = list(dict.fromkeys(stage.line or stage.name for stage in typical if stage.seconds is None))
    wall = hours = None
    if not any(stage.seconds is None for stage in typical if stage.gpus):
        draws = max(20, min(draws, 200_000 // sum(stage.jobs for stage in typical)))
        rng = np.random.default_rng(0)
        runs = [stages(cfg, data, rates, rng, gpus_per_job) for _ in range(draws)]
        wall = _band([makespan(run, gpus, cores) for run in runs], makespan(typical, gpus, cores))
        hours = _band([_gpu_hours(run) for run in runs], _gpu_hours(typical))
    return Plan(lines, wall, hours, sum(room.values()), unknown, _notes(typical, rates, gpus, gpus_per_job))


def stages(cfg: Config, data: Data, rates: Rates, rng: np.random.Generator | None, gpus_per_job: int = 1) -> list[Stage]:
    """Every rule with its rows, jobs and inputs. Without `rng` the typical figures, else one draw of what they may be."""
    corpus, rounds = cfg.shards.corpus, cfg.shards.rounds
    wrong = _share(rates.wrong, rng)
    asked_again = data.rounds * (wrong + (1 - wrong) * cfg.reanswer.right_share)
    asked = rates.asked
    each = _value(asked.draw if asked else None, asked.typical if asked else cfg.reanswer.references, rng)
    again = asked_again * each
    pairs = asked_again * _share(rates.pairs, rng) if rates.pairs else math.inf
    same, whole = True, False
    planned = [
        Stage("catalog", data.pairs, 1, 0),
        Stage("embed", data.pairs, corpus, 1, (("catalog", whole),)),
        _merge("embeddings", "embed"),
        Stage("build_index", data.pairs, 1, 0, (("merge embeddings", whole),)),
        Stage("split", data.rounds, rounds, 0),
        Stage("answer", data.rounds, rounds, 1, (("split", same),)),
        Stage("score answers", data.rounds, rounds, 1, (("answer", same),), (("score/answers", data.rounds),)),
        Stage("retrieve", data.images, rounds, 1, (("split", same), ("build_index", whole)), fresh=data.fresh),
        Stage("reanswer", again, rounds, 1, (("score answers", same), ("retrieve", same))),
        Stage("score reanswers", again, rounds, 1, (("reanswer", same),), (("score/reanswers", again),)),
        _merge("rounds", "split"),
        _merge("answers", "answer"),
        _merge("scores/answers", "score answers"),
        _merge("neighbors", "retrieve"),
        _merge("reanswers", "reanswer"),
        _merge("scores/reanswers", "score reanswers"),
    ]
    for model in ("tuned", *cfg.variants):
        pair, finetune = (cfg.pair, cfg.finetune) if model == "tuned" else cfg.variant(model)
        name = planevaluate.finetune(model)
        before = name.replace("finetune", "pair")
        key = f"finetune/{model}" if f"finetune/{model}" in rates.stages else "finetune"
        rows, processes = min(pair.samples, pairs) * finetune.epochs, finetune.processes * finetune.nodes
        after = (("merge scores/reanswers", whole), ("merge neighbors", whole))
        planned.append(Stage(before, 0, 1, 0, after, (("pair", 0),)))
        planned.append(Stage(name, rows, 1, processes, ((before, whole),), ((key, rows),), workers=processes))
    planned += planevaluate.stages(cfg, data.tasks)
    drawn: dict[str, Rate] = {}
    return [_timed(_held(stage, gpus_per_job), data, rates, rng, drawn) for stage in planned]


def disk(cfg: Config, data: Data, sizes: Sizes, planned: Sequence[Stage], gpus: int) -> dict[str, int]:
    """Bytes that each stage will have written, at most: Parquet compresses what is counted here in full.

    A fine-tune holds two checkpoints and writes a third, and removes them at its end. ZeRO keeps weights in 2 bytes and, of
    what is trained, a float32 copy and Adam's two moments (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1); without
    it all are float32.
    """
    rows = {stage.name: math.ceil(stage.rows) for stage in planned}
    response = 48 + 5 * cfg.answer.max_new_tokens  # bytes: ids, and five letters a token
    room = {
        "catalog": data.corpus_bytes,
        "embed": data.pairs * (2 * sizes.dim + 8),
        "build_index": data.pairs * (4 * sizes.dim + 16),
        "split": data.rounds_bytes,
        "answer": data.rounds * response,
        "score answers": data.rounds * 32,
        "retrieve": data.images * cfg.retrieve.references * 24,
        "reanswer": rows["reanswer"] * response,
        "score reanswers": rows["reanswer"] * 32,
        **planevaluate.disk(cfg, data.tasks),
    }
    free = gpus
    for model in ("tuned", *cfg.variants):
        pair, finetune = (cfg.pair, cfg.finetune) if model == "tuned" else cfg.variant(model)
        name = planevaluate.finetune(model)
        weight = 2 if cfg.lvlm.dtype == "bfloat16" and finetune.zero_stage else 4
        checkpoint = sizes.parameters * weight + sizes.trained * (12 if weight == 2 else 8)
        at_once = free > 0  # those that are trained later find the others' checkpoints gone
        free -= finetune.processes * finetune.nodes
        room[name.replace("finetune", "pair")] = pair.samples * 2 * 4096
        room[name] = sizes.parameters * weight + 3 * checkpoint * at_once
    return room


def shards_that_fit(stage: Stage, at_once: int) -> int:
    """Parts of about 40 minutes: `rows x seconds a row / 2400`; at least one for each job that runs at once."""
    return max(math.ceil(stage.rows * (stage.row or 0.0) / TARGET), at_once, 1)


# --- details ----------------------------------------------------------------------------------------------------------


def _merge(dataset: str, stage: str) -> Stage:
    return Stage(f"merge {dataset}", 0, 1, 0, ((stage, False),), (("merge", 0),), line="merge")


def _held(stage: Stage, gpus_per_job: int) -> Stage:
    """`stage` where a job gets so many GPUs at least."""
    if not stage.gpus:
        return stage
    workers = gpus_per_job if stage.name.split()[0] in FILLING else stage.workers
    return stage._replace(gpus=max(stage.gpus, gpus_per_job), workers=workers)


def _timed(stage: Stage, data: Data, rates: Rates, rng: np.random.Generator | None, drawn: dict[str, Rate]) -> Stage:
    """`stage` with its seconds. What is drawn for a key holds for all stages that use it."""
    keys = stage.rates or ((stage.name, stage.rows),)
    known = [rates.stages.get(key, Rate()) for key, _ in keys]
    figures = [_once(drawn, key, rate, rng) for (key, _), rate in zip(keys, known, strict=True)]
    sources = dict.fromkeys(part.source for rate in known for part in (rate.row or rate.start,) if part)
    source, start = ", ".join(sources), figures[0][1]
    if not stage.gpus:
        # each job reads the whole files
        seconds = data.read_seconds.get(stage.name, 0.0)
        return stage._replace(row=0.0, start=None if start is None else start + seconds, source=source)
    if stage.fresh is not None and known[0].row is None:
        embed = _once(drawn, "embed", rates.stages.get("embed", Rate()), rng)
        search = _once(drawn, "search", rates.stages.get("search", Rate()), rng)
        if embed[0] is None or search[0] is None:
            return stage
        each = stage.fresh / max(stage.rows, 1) * embed[0] + search[0] * data.pairs / 1e6
        return stage._replace(row=each, start=embed[1], source="calibration of embed and search")
    row = _mean([(figure[0], rows) for figure, (_, rows) in zip(figures, keys, strict=True)])
    return stage._replace(row=None if row is None else row / stage.workers, start=start, source=source)


def _mean(figures: Sequence[tuple[float | None, float]]) -> float | None:
    """Seconds a row, over rows of several kinds; None if one of them is not known."""
    total, rows = 0.0, 0.0
    for seconds, count in figures:
        if seconds is None:
            return None
        total, rows = total + seconds * count, rows + count
    return total / rows if rows else figures[0][0]


def _once(drawn: dict[str, Rate], key: str, known: Rate, rng: np.random.Generator | None) -> tuple[float | None, float | None]:
    """(seconds a row, seconds to start) of a key: typical, or drawn once a run."""
    if rng is None:
        return (known.row.typical if known.row else None), (known.start.typical if known.start else None)
    if key not in drawn:
        fixed = [part._replace(values=(part.draw(rng),)) if part else None for part in known]
        drawn[key] = Rate(*fixed)
    row, start = drawn[key]
    return (row.values[0] if row else None), (start.values[0] if start else None)


def _share(counted: tuple[int, int] | None, rng: np.random.Generator | None) -> float:
    hits, total = counted or _BLIND
    if rng is None:
        return hits / max(total, 1)
    return float(rng.beta(hits + 0.5, total - hits + 0.5))  # Jeffreys' prior


def _value(draw: Callable[[np.random.Generator], float] | None, typical: float, rng: np.random.Generator | None) -> float:
    return draw(rng) if draw and rng is not None else typical


def _lines(planned: Sequence[Stage], room: Mapping[str, int], gpus: int, cores: int) -> list[Line]:
    """A line for each stage, or for several that belong together."""
    groups: dict[str, list[Stage]] = {}
    for stage in planned:
        groups.setdefault(stage.line or stage.name, []).append(stage)
    return [_line(name, group, sum(room.get(one.name, 0) for one in group), gpus, cores) for name, group in groups.items()]


def _line(name: str, group: Sequence[Stage], room: int, gpus: int, cores: int) -> Line:
    longest = hours = wall = None
    seconds = [stage.seconds for stage in group]
    if None not in seconds:
        longest = max(one for one in seconds if one is not None)
        hours = _gpu_hours(group) if group[0].gpus else None
        wall = makespan([stage._replace(after=()) for stage in group], gpus, cores)
    rows, jobs = round(sum(stage.rows for stage in group)), sum(stage.jobs for stage in group)
    return Line(
        name, rows, jobs, longest, hours, wall, room, ", ".join(dict.fromkeys(one.source for one in group if one.source))
    )


def _gpu_hours(run: Sequence[Stage]) -> float:
    return sum((stage.seconds or 0.0) * stage.jobs * stage.gpus for stage in run) / 3600


def _band(values: Sequence[float], middle: float) -> tuple[float, float, float]:
    low, high = np.quantile(values, [0.05, 0.95])
    return min(float(low), middle), middle, max(float(high), middle)


def _notes(planned: Sequence[Stage], rates: Rates, gpus: int, gpus_per_job: int) -> list[str]:
    """Parts that are too long or too short, by the longest stage over each kind of shard; guesses that were made."""
    notes = []
    by_key: dict[str, Callable[[Stage], bool]] = {
        "corpus": lambda stage: stage.name == "embed",
        "rounds": lambda stage: stage.name in ("answer", "reanswer", "score answers", "score reanswers", "retrieve"),
    }
    for key, mine in by_key.items():
        timed = [stage for stage in planned if mine(stage) and stage.seconds is not None]
        if not timed:
            continue
        longest = max(timed, key=lambda stage: stage.seconds or 0.0)
        seconds, fits = longest.seconds or 0.0, shards_that_fit(longest, max(1, gpus // gpus_per_job))
        wrong = "more than 60" if seconds > LONG else "less than 20" if seconds < SHORT else ""
        if wrong and (fits > longest.jobs if seconds > LONG else fits < longest.jobs):
            what = f"a part of {longest.name} will take {plantable.time(seconds)}, {wrong} minutes"
            notes.append(f"{what}; next: set shards.{key} to {fits} (it is {longest.jobs})")
    for stage in planned:
        if stage.gpus > gpus:
            notes.append(f"{stage.name} asks for {stage.gpus} GPUs at a time, the plan is for {gpus}")
    if rates.wrong is None:
        notes.append("the share of wrong first answers is not known yet: half of them, with all references, is assumed")
    return notes
