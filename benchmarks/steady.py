"""The rate of a stage behind its ramp, from what it saves: it is given more rows than it can finish, and ended in time.

A stage's first slices are short, and a stage that ends has a short last one. The rate is that between two saves: the one before
the first full-size slice, and the last full-size one. Since the model takes slices one after the other, and the next one is
ready when a slice is saved, that is the time in which the model answered those rows and no others. A stage whose very first
slice is full-size is timed from the model's first batch on.
"""

import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from surf import store

PATIENCE = 3  # times the seconds that a stage gets: then it is ended even if nothing but its ramp is saved

Save = tuple[float, list[dict[str, Any]]]  # (when, the rows)


class TimeUp(Exception):
    """The stage has had its seconds."""


class Saves(store.Partial):
    """A `Partial` that notes what was saved when, and ends its stage.

    Args:
        size: rows of a full-size slice. Half of them will do: `reanswer` lets its turns shrink to that before it fills them up.
        seconds: how long the stage may take; None: until its rows are done.
    """

    def __init__(self, out: Path, dataset: str, size: int, seconds: float | None) -> None:
        super().__init__(out, dataset)
        self.full, self.seconds = max(1, size // 2), seconds
        self.begun: float | None = None  # the model's first batch
        self.made: list[Save] = []

    def save(self, table: pa.Table) -> None:
        """Add finished rows.

        Raises:
            TimeUp: the time is up.
        """
        super().save(table)
        if table.num_rows:
            self.made.append((time.perf_counter(), store.rows(table)))
        self.check()

    def check(self) -> None:
        """To be called before each batch: both slices at work end there, not only the one that is saved.

        Raises:
            TimeUp: the time is up and a full-size slice is saved; or it has been up for long and anything is.
        """
        now = time.perf_counter()
        self.begun = self.begun or now
        if self.seconds is None or not self.made:
            return
        steady = any(len(rows) >= self.full for _, rows in self.made)
        if now - self.begun >= self.seconds * (1 if steady else PATIENCE):
            raise TimeUp

    def steady(self) -> tuple[list[dict[str, Any]], float, int]:
        """(rows, seconds, full-size slices among them) of the steady state; all rows and no slice where there was none."""
        large = [number for number, (_, rows) in enumerate(self.made) if len(rows) >= self.full]
        first, last = (large[0], large[-1]) if large else (0, len(self.made) - 1)
        start = self.made[first - 1][0] if first else self.begun or 0.0
        return [row for _, rows in self.made[first : last + 1] for row in rows], self.made[last][0] - start, len(large)
