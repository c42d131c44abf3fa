"""What a run will take: rows, jobs, GPU-hours, wall time and disk of every stage, with an error band.

A job takes `start + rows x seconds a row`. The wall time of the whole is that of a simulated run: jobs start as soon as their
inputs are there and a GPU and a core are free. The band (5th to 95th percentile) comes from many such runs, each with rates and
shares drawn anew from what the repeated measurements leave open.
"""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from surf import plantable
from surf.config import Config
from surf.rates import Rates
from surf.rates import Stage as Rate

DRAWS = 200
TARGET = 2400  # seconds of a part; docs/usage.md: 20 to 60 minutes
SHORT, LONG = 1200, 3600
_BLIND = (1, 2)  # of the rounds wrong, and so of anything else, if nobody has measured it


class Data(NamedTuple):
    """Rows of the user's data. Images of queries that the corpus lacks are `fresh`: they have to be embedded again."""

    pairs: int
    corpus_bytes: int
    rounds: int
    rounds_bytes: int
    images: int
    fresh: int
    questions: Mapping[str, tuple[int, int, int]]  # split: questions, images, fresh images
    read_seconds: Mapping[str, float]  # of catalog and split: reading the files once


class Sizes(NamedTuple):
    """Of the models: numbers in an embedding, parameters, parameters that are trained. 0: not known."""

    dim: int = 0
    parameters: int = 0
    trained: int = 0


class Stage(NamedTuple):
    """One rule, or one use of a rule, with its work."""

    name: str
    rows: float
    jobs: int
    gpus: int  # of each job; 0: it runs on a core alone
    after: tuple[tuple[str, bool], ...] = ()  # (stage, whether job i waits for job i alone)
    row: float | None = None  # seconds
    start: float | None = None  # seconds
    source: str = ""

    @property
    def seconds(self) -> float | None:
        """Of one job."""
        if self.start is None or (self.row is None and self.rows):
            return None
        return self.start + self.rows / self.jobs * (self.row or 0.0)


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


def plan(cfg: Config, data: Data, sizes: Sizes, rates: Rates, *, gpus: int, cores: int, draws: int = DRAWS) -> Plan:
    """The plan for `gpus` GPUs and `cores` cores at a time."""
    typical = stages(cfg, data, rates, None)
    room = disk(cfg, data, sizes, typical)
    lines = _lines(typical, room, gpus, cores)
    unknown = [stage.name for stage in typical if stage.seconds is None]
    wall = hours = None
    if not any(stage.seconds is None for stage in typical if stage.gpus):
        draws = max(20, min(draws, 200_000 // sum(stage.jobs for stage in typical)))
        rng = np.random.default_rng(0)
        runs = [stages(cfg, data, rates, rng) for _ in range(draws)]
        wall = _band([makespan(run, gpus, cores) for run in runs], makespan(typical, gpus, cores))
        hours = _band([_gpu_hours(run) for run in runs], _gpu_hours(typical))
    return Plan(lines, wall, hours, sum(room.values()), unknown, _notes(cfg, typical, rates, gpus))


def stages(cfg: Config, data: Data, rates: Rates, rng: np.random.Generator | None) -> list[Stage]:
    """Every rule with its rows, jobs and inputs. Without `rng` the typical figures, else one draw of what they may be."""
    corpus, rounds = cfg.shards.corpus, cfg.shards.rounds
    wrong = data.rounds * _share(rates.wrong, rng)
    asked = rates.asked
    each = _value(asked.draw if asked else None, asked.typical if asked else cfg.reanswer.references, rng)
    samples = min(cfg.pair.samples, wrong * _share(rates.pairs, rng) if rates.pairs else cfg.pair.samples)
    training = min(samples, cfg.pair.samples) * cfg.finetune.epochs
    same, whole = True, False
    planned = [
        Stage("catalog", data.pairs, 1, 0),
        Stage("embed", data.pairs, corpus, 1, (("catalog", whole),)),
        Stage("merge embeddings", 0, 1, 0, (("embed", whole),)),
        Stage("build_index", data.pairs, 1, 0, (("merge embeddings", whole),)),
        Stage("split", data.rounds, rounds, 0),
        Stage("answer", data.rounds, rounds, 1, (("split", same),)),
        Stage("score answers", data.rounds, rounds, 1, (("answer", same),)),
        Stage("retrieve", data.images, rounds, 1, (("split", same), ("build_index", whole))),
        Stage("reanswer", wrong * each, rounds, 1, (("score answers", same), ("retrieve", same))),
        Stage("score reanswers", wrong * each, rounds, 1, (("reanswer", same),)),
        *[
            Stage(f"merge {name}", 0, 1, 0, ((stage, whole),))
            for name, stage in {
                "rounds": "split",
                "answers": "answer",
                "scores/answers": "score answers",
                "neighbors": "retrieve",
                "reanswers": "reanswer",
                "scores/reanswers": "score reanswers",
            }.items()
        ],
        Stage("pair", 0, 1, 0, (("merge scores/reanswers", whole), ("merge neighbors", whole))),
        Stage("finetune", training, 1, cfg.finetune.processes * cfg.finetune.nodes, (("pair", whole),)),
    ]
    planned.append(Stage("pope_questions", 0, len(data.questions), 0))
    if any(method.references for method in cfg.pope.methods.values()):
        images = sum(images for _, images, _ in data.questions.values())
        planned.append(
            Stage("pope_retrieve", images, len(data.questions), 1, (("pope_questions", same), ("build_index", whole)))
        )
    questions = sum(count for count, _, _ in data.questions.values())
    for name, method in cfg.pope.methods.items():
        after = [("pope_retrieve" if method.references else "pope_questions", same)]
        after += [("finetune", whole)] if method.model == "tuned" else []
        planned.append(Stage(f"pope_answer {name}", questions, len(data.questions), 1, tuple(after)))
    planned.append(Stage("pope", 0, 1, 0, tuple((f"pope_answer {name}", whole) for name in cfg.pope.methods)))
    planned.append(Stage("report", 0, 1, 0, (("pope", whole),)))
    drawn: dict[str, Rate] = {}
    return [_timed(stage, cfg, data, rates, rng, drawn) for stage in planned]


def makespan(run: Sequence[Stage], gpus: int, cores: int) -> float:
    """Seconds from the first start to the last end, if every job starts as soon as it can. Stages without a rate take none."""
    waits: dict[tuple[int, int], int] = {}
    frees: dict[tuple[int, int], list[tuple[int, int]]] = {}
    number = {stage.name: index for index, stage in enumerate(run)}
    barriers: dict[int, list[tuple[int, int]]] = {}
    left = [stage.jobs for stage in run]
    for index, stage in enumerate(run):
        for job in range(stage.jobs):
            waits[index, job] = len(stage.after)
            for name, same in stage.after:
                if same:
                    frees.setdefault((number[name], job), []).append((index, job))
                else:
                    barriers.setdefault(number[name], []).append((index, job))
    ready: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])  # without and with a GPU
    for (index, job), count in waits.items():
        if not count:
            heapq.heappush(ready[run[index].gpus > 0], (index, job))
    running: list[tuple[float, int, int]] = []
    needs = [min(stage.gpus, gpus) for stage in run]
    now = 0.0
    while any(ready) or running:
        for queue in ready:
            while queue and cores and needs[queue[0][0]] <= gpus:
                index, job = heapq.heappop(queue)
                gpus, cores = gpus - needs[index], cores - 1
                heapq.heappush(running, (now + (run[index].seconds or 0.0), index, job))
        now, index, job = heapq.heappop(running)
        gpus, cores = gpus + needs[index], cores + 1
        left[index] -= 1
        for key in frees.get((index, job), []) + (barriers.get(index, []) if not left[index] else []):
            waits[key] -= 1
            if not waits[key]:
                heapq.heappush(ready[run[key[0]].gpus > 0], key)
    return now


def disk(cfg: Config, data: Data, sizes: Sizes, planned: Sequence[Stage]) -> dict[str, int]:
    """Bytes that each stage will have written, at most: Parquet compresses what is counted here in full.

    The fine-tune holds two checkpoints and writes a third: ZeRO keeps weights in 2 bytes and, of what is trained, a float32
    copy and Adam's two moments (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1); without it all are float32.
    """
    rows = {stage.name: math.ceil(stage.rows) for stage in planned}
    response = 48 + 5 * cfg.answer.max_new_tokens  # bytes: ids, and five letters a token
    weight = 2 if cfg.lvlm.dtype == "bfloat16" and cfg.finetune.zero_stage else 4
    moments = 12 if weight == 2 else 8
    checkpoint = sizes.parameters * weight + sizes.trained * moments
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
        "pair": cfg.pair.samples * 2 * 4096,
        "finetune": sizes.parameters * weight + 3 * checkpoint,
    }
    room.update({name: rows[name] * 256 for name in rows if name.startswith("pope_answer")})
    return room


def shards_that_fit(stage: Stage, gpus: int) -> int:
    """Parts of about 40 minutes: `rows x seconds a row / 2400`; at least one for each GPU."""
    return max(math.ceil(stage.rows * (stage.row or 0.0) / TARGET), gpus, 1)


# --- details ----------------------------------------------------------------------------------------------------------


def _timed(
    stage: Stage, cfg: Config, data: Data, rates: Rates, rng: np.random.Generator | None, drawn: dict[str, Rate]
) -> Stage:
    """`stage` with its seconds. What is drawn for a key holds for all stages that use it."""
    known = rates.stages.get(key := _key(stage.name, cfg), Rate())
    row = _once(drawn, key, known, rng)
    source = known.row.source if known.row else known.start.source if known.start else ""
    if stage.name in ("catalog", "split"):  # each of their jobs reads the whole files
        light = known.start.typical if known.start else None
        seconds = data.read_seconds.get(stage.name, 0.0)
        return stage._replace(row=0.0, start=None if light is None else light + seconds, source=source)
    if not stage.gpus:
        return stage._replace(row=row[0] or 0.0, start=row[1], source=source)
    if "retrieve" in stage.name and known.row is None:
        embed = _once(drawn, "embed", rates.stages.get("embed", Rate()), rng)
        search = _once(drawn, "search", rates.stages.get("search", Rate()), rng)
        if embed[0] is None or search[0] is None:
            return stage
        fresh, images = (data.fresh, data.images) if stage.name == "retrieve" else _evaluation(data)
        each = fresh / max(images, 1) * embed[0] + search[0] * data.pairs / 1e6
        return stage._replace(row=each, start=embed[1], source="calibration of embed and search")
    return stage._replace(row=row[0], start=row[1], source=source)


def _key(name: str, cfg: Config) -> str:
    """Key of a stage in `Rates`."""
    if name.startswith("pope_answer "):
        return f"pope_answer/{cfg.pope.methods[name.partition(' ')[2]].references}"
    return "merge" if name.startswith("merge ") else name.replace("score ", "score/")


def _once(drawn: dict[str, Rate], key: str, known: Rate, rng: np.random.Generator | None) -> tuple[float | None, float | None]:
    """(seconds a row, seconds to start) of a key: typical, or drawn once a run."""
    if rng is None:
        return (known.row.typical if known.row else None), (known.start.typical if known.start else None)
    if key not in drawn:
        fixed = [part._replace(values=(part.draw(rng),)) if part else None for part in known]
        drawn[key] = Rate(*fixed)
    row, start = drawn[key]
    return (row.values[0] if row else None), (start.values[0] if start else None)


def _evaluation(data: Data) -> tuple[int, int]:
    """(fresh images, images) over all splits."""
    return sum(fresh for _, _, fresh in data.questions.values()), sum(images for _, images, _ in data.questions.values())


def _share(counted: tuple[int, int] | None, rng: np.random.Generator | None) -> float:
    hits, total = counted or _BLIND
    if rng is None:
        return hits / max(total, 1)
    return float(rng.beta(hits + 0.5, total - hits + 0.5))  # Jeffreys' prior


def _value(draw: Callable[[np.random.Generator], float] | None, typical: float, rng: np.random.Generator | None) -> float:
    return draw(rng) if draw and rng is not None else typical


def _lines(planned: Sequence[Stage], room: Mapping[str, int], gpus: int, cores: int) -> list[Line]:
    """A line for each stage; one for all merges."""
    lines = [_line(stage, room.get(stage.name, 0), gpus, cores) for stage in planned if not stage.name.startswith("merge ")]
    merges = [_line(stage, 0, gpus, cores) for stage in planned if stage.name.startswith("merge ")]
    return [*lines, merges[0]._replace(stage="merge", jobs=len(merges))]


def _line(stage: Stage, room: int, gpus: int, cores: int) -> Line:
    seconds = stage.seconds
    hours = wall = None
    if seconds is not None:
        hours = seconds * stage.jobs * stage.gpus / 3600 if stage.gpus else None
        at_once = min(cores, max(1, gpus // stage.gpus)) if stage.gpus else cores
        wall = seconds * math.ceil(stage.jobs / at_once)
    return Line(stage.name, round(stage.rows), stage.jobs, seconds, hours, wall, room, stage.source)


def _gpu_hours(run: Sequence[Stage]) -> float:
    return sum((stage.seconds or 0.0) * stage.jobs * stage.gpus for stage in run) / 3600


def _band(values: Sequence[float], middle: float) -> tuple[float, float, float]:
    low, high = np.quantile(values, [0.05, 0.95])
    return min(float(low), middle), middle, max(float(high), middle)


def _notes(cfg: Config, planned: Sequence[Stage], rates: Rates, gpus: int) -> list[str]:
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
        seconds, fits = longest.seconds or 0.0, shards_that_fit(longest, gpus)
        wrong = "more than 60" if seconds > LONG else "less than 20" if seconds < SHORT else ""
        if wrong and (fits > longest.jobs if seconds > LONG else fits < longest.jobs):
            what = f"a part of {longest.name} will take {plantable.time(seconds)}, {wrong} minutes"
            notes.append(f"{what}; next: set shards.{key} to {fits} (it is {longest.jobs})")
    need = cfg.finetune.processes * cfg.finetune.nodes
    if need > gpus:
        notes.append(f"finetune asks for {need} GPUs at a time, the plan is for {gpus}")
    if rates.wrong is None:
        notes.append("the share of wrong first answers is not known yet: half of them, with all references, is assumed")
    return notes
