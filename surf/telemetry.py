"""How fast a stage ran, beside what it wrote."""

import logging
import sys
import time
from pathlib import Path

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

    def note(self, out: Path, rows: int) -> None:
        """Log and keep rows, rows_per_second, start_seconds, load_seconds, work_seconds and peak_gpu_mb of the part `out`.

        start_seconds is the whole time before `loaded`: the interpreter, its imports, and load_seconds.
        """
        import psutil

        work = max(time.monotonic() - self.ready, 1e-9)
        peak = 0.0
        if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**20
        figures = {
            "rows": rows,
            "rows_per_second": round(rows / work, 2),
            "start_seconds": round(time.time() - psutil.Process().create_time() - work, 2),
            "load_seconds": round(self.ready - self.start, 2),
            "work_seconds": round(work, 2),
            "peak_gpu_mb": round(peak, 1),
        }
        store.write_json(out.parent / "_telemetry" / f"{out.stem}.json", figures)
        log.info("%s", ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in figures.items()))
