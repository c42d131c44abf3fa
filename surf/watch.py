"""A look-out for jobs that SLURM has forgotten while Snakemake still waits for them.

Snakemake's plugin takes a job that no query shows for one that will show up later, and one that was preempted and cancelled
for one that goes on: it would wait for ever. Here Snakemake is stopped instead, as by Ctrl-C, once it waits for nothing else.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from surf.errors import SurfError

PATIENCE = "SURF_LOST_AFTER"  # seconds that a job may be missing from the queue
_DEFAULT = "600"  # the plugin polls every three minutes at least, then waits a minute for files
# In Snakemake's log. `jobid` stands in the paragraph about a failure, and in that about a job that is about to start.
_EVENT = re.compile(r"^Job (\d+) has been submitted with SLURM jobid (\d+)|^Finished jobid: (\d+)|^    jobid: (\d+)$", re.M)


def start(log: Path) -> None:
    """Look out for as long as this Snakemake runs; `log` is its log file."""
    text = os.environ.get(PATIENCE, _DEFAULT)
    if not text.isdecimal() or not int(text):
        raise SurfError("is no number of seconds", where=f"{PATIENCE}={text}", expected=f"a whole number such as {_DEFAULT}")
    threading.Thread(target=_watch, args=(log, float(text)), daemon=True).start()


def waited_for(log: str) -> set[str]:
    """SLURM's numbers of the jobs that are submitted and not ended, from Snakemake's log."""
    found: dict[str, str] = {}
    for match in _EVENT.finditer(log):
        if match[1]:
            found[match[1]] = match[2]
        else:
            found.pop(match[3] or match[4], None)
    return set(found.values())


class Lost:
    """Tells when all jobs that are waited for have been missing from the queue for a while.

    Args:
        patience: that while, in seconds.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.missing: dict[str, float] = {}  # since when

    def look(self, waiting: set[str], shown: set[str] | None, now: float) -> list[str]:
        """The lost jobs; none as long as another one is there, or the queue does not answer (`shown` is None)."""
        self.missing = {job: self.missing.get(job, now) for job in waiting - shown} if shown is not None else {}
        lost = [job for job, since in self.missing.items() if now - since >= self.patience]
        return sorted(lost, key=int) if len(lost) == len(waiting) else []


def _watch(log: Path, patience: float) -> None:
    lost = Lost(patience)
    while True:
        time.sleep(min(60.0, patience / 4))
        if jobs := lost.look(waited_for(log.read_text(errors="replace")), _shown(), time.monotonic()):
            print(
                f"error: SLURM has forgotten job{'s' * (len(jobs) > 1)} {' '.join(jobs)}, and will never say how they ended;"
                " expected them in the queue; next: the same command again, finished parts and rows are kept",
                file=sys.stderr,
                flush=True,
            )
            os.kill(os.getpid(), signal.SIGINT)
            return


def _shown() -> set[str] | None:
    """Numbers of this user's jobs in the queue, those that ended lately too; None if the controller does not answer."""
    command = ["squeue", "--me", "--states", "all", "--noheader", "--format", "%A"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return set(done.stdout.split()) if done.returncode == 0 else None
