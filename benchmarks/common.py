"""What all benchmarks share: the machine in words, Markdown tables, peak memory."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from surf import tables

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # plain.py: the loops that tests compare with are baselines here


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
    return tables.table(head, [[_text(cell) for cell in row] for row in rows])


def peak_mb() -> float:
    """Largest resident memory of this process so far (MiB). Linux; getrusage's would count the parent's too."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def kill(running: "subprocess.Popen[str]") -> None:
    """SIGKILL to a process and all that it has started, at once."""
    import psutil

    for process in [*psutil.Process(running.pid).children(recursive=True), running]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def seconds(work: Callable[[], object], times: int) -> float:
    """Seconds of a call, after as many calls to warm up; the GPU, if there is one, is waited for."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    begin = end = 0.0
    for _ in range(2):
        wait()
        begin = time.perf_counter()
        for _ in range(times):
            work()
        wait()
        end = time.perf_counter()
    return (end - begin) / times


def python(*words: str) -> str:
    """Standard output of a new interpreter that runs in the repository root."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr}")
    return done.stdout


def _text(cell: object) -> str:
    if not isinstance(cell, float):
        return str(cell)
    if abs(cell) >= 100:
        return f"{cell:,.0f}"
    return f"{cell:.3g}"
