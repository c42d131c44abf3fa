"""What all benchmarks share: the machine in words, Markdown tables, peak memory."""

import os
import platform
import resource
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def machine() -> str:
    """Processor, cores and GPU of this machine, and the versions that matter; no name, no path."""
    import torch

    cores = len(os.sched_getaffinity(0))
    words = [f"{cores} cores ({platform.machine()})"]
    if torch.cuda.is_available():
        words.insert(0, torch.cuda.get_device_name(0))
    return f"{', '.join(words)}; Python {platform.python_version()}, torch {torch.__version__}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats get three significant digits."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_text(cell) for cell in line) + " |" for line in lines)


def peak_mb() -> float:
    """Largest resident memory of this process so far (MiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _text(cell: object) -> str:
    if not isinstance(cell, float):
        return str(cell)
    if abs(cell) >= 100:
        return f"{cell:,.0f}"
    return f"{cell:.3g}"
