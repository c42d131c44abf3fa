"""What a stage notes about its own run, in the Parquet metadata of what it wrote."""

import sys
import time
from typing import Any


class Clock:
    """Start it first, call `loaded` when the models are ready, and ask for `meta` at the end."""

    def __init__(self) -> None:
        self.start = self.ready = time.monotonic()

    def loaded(self) -> None:
        """The models are loaded; what follows is work."""
        self.ready = time.monotonic()

    def meta(self, rows: int) -> dict[str, Any]:
        """Rates and memory: rows_per_second, load_seconds, work_seconds, peak_gpu_mb."""
        work = max(time.monotonic() - self.ready, 1e-9)
        peak = 0.0
        if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**20
        return {
            "rows_per_second": round(rows / work, 2),
            "load_seconds": round(self.ready - self.start, 2),
            "work_seconds": round(work, 2),
            "peak_gpu_mb": round(peak, 1),
        }
