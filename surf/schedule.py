"""The jobs of a run, and how long they take together."""

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class Stage(NamedTuple):
    """One rule, or one use of a rule, with its work. `plan` fills in the seconds."""

    name: str
    rows: float
    jobs: int
    gpus: int  # that each job holds; 0: it runs on a core alone
    after: tuple[tuple[str, bool], ...] = ()  # (stage, whether job i waits for job i alone)
    rates: tuple[tuple[str, float], ...] = ()  # (key in `Rates`, rows at this rate); empty: all rows, under its name
    fresh: float | None = None  # of `retrieve`: images that have to be embedded
    workers: int = 1  # that share the rows of a job; rates are those of one
    line: str = ""  # of the plan's table, if it is one for several stages
    row: float | None = None  # seconds
    start: float | None = None  # seconds
    source: str = ""

    @property
    def seconds(self) -> float | None:
        """Of one job."""
        if self.start is None or (self.row is None and self.rows):
            return None
        return self.start + self.rows / self.jobs * (self.row or 0.0)


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
