"""How fast a stage ran, beside what it wrote."""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surf import store

log = logging.getLogger("surf")


class Clock:
    """Start it first, call `loaded` when the models are ready, and `note` at the end.

    The figures lie in `_telemetry/<part>.json` beside the part, not in its metadata: a part that is made again with equal
    content has equal bytes, and nothing that depends on it reruns.
    """

    def __init__(self) -> None:
        self.start = self.ready = time.monotonic()

    def loaded(self) -> None:
        """The models are loaded; what follows is work."""
        self.ready = time.monotonic()

    def note(self, out: Path, rows: int, meter: "Meter | None" = None, *, workers: int = 1, since: float | None = None) -> None:
        """Log and keep rows, rows_per_second, start_seconds, load_seconds, work_seconds and peak_gpu_mb of the part `out`.

        start_seconds is the whole time before `loaded`: the interpreter, its imports, and load_seconds. With a meter also the
        busy share of each step.

        Args:
            workers: processes that shared the rows.
            since: the moment (`time.monotonic()`) when work on this part began, if others came before it.
        """
        import psutil

        now = time.monotonic()
        work = max(now - (self.ready if since is None else since), 1e-9)
        peak = 0.0
        if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**20
        figures: dict[str, Any] = {
            "rows": rows,
            "rows_per_second": round(rows / work, 2),
            "start_seconds": round(time.time() - psutil.Process().create_time() - (now - self.ready), 2),
            "load_seconds": round(self.ready - self.start, 2),
            "work_seconds": max(round(work, 2), 0.01),  # 0.00 would say that nothing was measured, see `figures`
            "peak_gpu_mb": round(peak, 1),
        }
        if workers > 1:
            figures["workers"] = workers
        if meter is not None:
            figures["busy"] = meter.shares(work)
        store.write_json(out.parent / "_telemetry" / f"{out.stem}.json", figures)
        log.info("%s", ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in figures.items() if key != "busy"))
        if meter is not None and (shares := figures["busy"]):
            busy = ", ".join(f"{what} {share:.0%}" for what, share in shares.items())
            log.info("busy share of the time: %s; %s bounds the stage", busy, max(shares, key=lambda what: shares[what]))


def figures(folder: Path, part: str = "*") -> list[dict[str, float]]:
    """What `Clock.note` kept of the parts in `folder` that are still there and have rows."""
    found = []
    for path in sorted(folder.glob(f"_telemetry/{part}.json")):
        if (folder / f"{path.stem}.parquet").exists():
            one = store.read_json(path)
            if one.get("rows") and one.get("work_seconds"):
                found.append({"start_seconds": one.get("load_seconds", 0.0), "workers": 1, **one})
    return found


class Meter:
    """How long each step of a stage was busy, whatever thread it ran in. What is busy all the time bounds the stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, what: str, seconds: float) -> None:
        """Count busy time. Of n threads that share a step each counts an n-th."""
        with self._lock:
            self.seconds[what] = self.seconds.get(what, 0.0) + seconds

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Count the time of the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(what, time.perf_counter() - start)

    def shares(self, total: float) -> dict[str, float]:
        """Busy share of each step in `total` seconds."""
        with self._lock:
            return {what: round(seconds / total, 3) for what, seconds in sorted(self.seconds.items())}
