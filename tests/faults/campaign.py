"""Random faults: runs a small form of the embedded example while everything goes wrong, and compares the results.

    python tests/faults/campaign.py --kills 100 --seed 1       (or: make faults)

First it runs unharmed: the truth. Then harmed lives follow, each from nothing to its end: stages by their own commands
(`stages.py`), and all through Snakemake (`workflow.py`), whose own advice is followed after each failure. The table says what
struck; the exit code is 1 if a row is lost or doubled, if a file differs from the truth, or if anything stays behind.
The full disk needs root (a tmpfs of its own); without it that harm is left out.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import workflow
from small import Example, Job, difference

SIGNALS = ["SIGKILL", "SIGTERM", "SIGUSR1", "SIGINT"]
HERE = Path(__file__).parent


class Campaign:
    """The truth, the harmed lives, and what became of them."""

    def __init__(self, base: Path, scale: float, seed: int, shards: int = 2) -> None:
        self.base, self.size, self.seed = base, (scale, shards), seed
        self.events: Counter = Counter()
        self.faults: list[str] = []
        self.strange = self.lost = self.doubled = self.twice = self.kept = self.reruns = self.lives = 0
        self.looked_at = self.half_written = 0
        self.truth = Example(base / "truth").create(*self.size)
        self.jobs: list[Job] = []
        self.seconds: dict[str, float] = {}

    def find_truth(self, *targets: str) -> None:
        """The unharmed run."""
        self.jobs = self.truth.jobs(*targets)
        done = stages(self.truth, self.jobs, seed=0, seconds={})
        if done["faults"]:
            sys.exit("error: the unharmed run failed\n" + "\n".join(done["faults"]))
        self.seconds = done["seconds"]

    def by_hand(self, kills: int, training: int, others: bool) -> None:
        """One life of stages by their own commands."""
        number = self.lives = self.lives + 1
        example = Example(self.base / f"life{number}").create(*self.size)
        with disk(example.results) if others else _nothing():
            done = stages(
                example,
                self.jobs,
                seed=self.seed + number,
                kills=kills,
                training=training,
                others=others,
                seconds=self.seconds,
            )
            self.settle(f"life {number}, stages by their own commands", example, done)

    def through_snakemake(self, kills: int) -> None:
        """One life through Snakemake."""
        number = self.lives = self.lives + 1
        example = Example(self.base / f"life{number}").create(*self.size)
        self.settle(f"life {number}, through Snakemake", example, workflow.run(example, seed=self.seed + number, kills=kills))

    def settle(self, name: str, example: Example, done: dict) -> None:
        """Compare a finished life with the truth, and add up."""
        different = difference(self.truth, example)
        for rule, what, count in done["events"]:
            self.events[rule, what] += count
        faults = list(done["faults"])
        faults += [f"{len(different.files)} files differ: {different.files[:5]}"] if different.files else []
        faults += [f"left behind: {different.strays[:5]}"] if different.strays else []
        faults += [f"half-written: {done['half_written'][:5]}"] if done["half_written"] else []
        self.faults += [f"{name}: {fault}" for fault in faults]
        self.looked_at += done["looked_at"]
        self.half_written += len(done["half_written"])
        self.strange += len(different.files) + len(different.strays)
        self.lost += different.lost
        self.doubled += different.doubled
        self.twice += done["twice"]
        self.kept += done["kept"]
        self.reruns += done.get("reruns", 0)
        say("\n".join([f"{name}: {'NOT AS THE TRUTH' if faults else 'as the truth'}", *faults]))

    def kills(self) -> int:
        """Signals that struck."""
        return sum(count for (_, what), count in self.events.items() if what in SIGNALS)

    def table(self) -> str:
        """Markdown: what struck each stage."""
        order = list(dict.fromkeys(job.rule for job in self.jobs))
        rules = sorted({rule for rule, _ in self.events}, key=lambda rule: (order.index(rule) if rule in order else 99, rule))
        lines = ["| Struck | " + " | ".join(SIGNALS) + " | Other harms |", "| --- |" + " ---: |" * len(SIGNALS) + " --- |"]
        for rule in rules:
            counts = [str(self.events[rule, name] or "") for name in SIGNALS]
            others = {what: n for (one, what), n in sorted(self.events.items()) if one == rule and what not in (*SIGNALS, LATE)}
            text = ", ".join(what if n == 1 else f"{n} × {what}" for what, n in others.items())
            lines.append(f"| {rule} | {' | '.join(counts)} | {text} |")
        totals = [str(sum(n for (_, what), n in self.events.items() if what == name)) for name in SIGNALS]
        harms = sum(n for (_, what), n in self.events.items() if what not in (*SIGNALS, LATE))
        return "\n".join([*lines, f"| **all** | {' | '.join(totals)} | {harms} |"])


LATE = "came too late"


def stages(example: Example, jobs: list[Job], **task: object) -> dict:
    """A life of stages by their own commands: a program of its own, which forks."""
    words = [[job.rule, job.output, job.command] for job in jobs]
    task |= {"folder": str(example.folder), "jobs": words}
    done = subprocess.run(
        [sys.executable, HERE / "stages.py"], input=json.dumps(task), capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"error: stages.py failed\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def disk(folder: Path):
    """A small disk of its own, if we may."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "nr_blocks=65536", "surf-faults", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        say("no full disk here: that needs root and a mount")
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def _nothing():
    yield


def say(text: str) -> None:
    """Progress, beside the table."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=0.15, help="size of the example")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    begun = time.monotonic()
    base = Path(tempfile.mkdtemp(prefix="surf-campaign-", dir="/var/tmp"))
    try:
        campaign = Campaign(base, args.scale, args.seed)
        campaign.find_truth()
        rows = campaign.truth.keys().total()
        say(f"the truth: {len(campaign.jobs)} jobs, {rows} rows")
        half = args.kills * 11 // 25  # the rest through Snakemake, which takes longer
        with ThreadPoolExecutor(2) as pool:
            work = [
                pool.submit(campaign.through_snakemake, args.kills - 2 * half),
                pool.submit(campaign.by_hand, half, 2, True),
                pool.submit(campaign.by_hand, half, 2, False),
            ]
            for one in work:
                one.result()
        while campaign.kills() < args.kills:  # some came too late
            campaign.by_hand(args.kills - campaign.kills() + 3, 0, False)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    print(campaign.table() + "\n")
    print(
        f"{campaign.kills()} kills and the other harms in {campaign.lives} lives of {len(campaign.jobs)} jobs"
        f" and {rows} rows each, {time.monotonic() - begun:.0f} s. Rows lost: {campaign.lost}. Duplicates: {campaign.doubled}."
        f" Files that differ from the unharmed run, or were left behind: {campaign.strange}."
        f" Files looked at when they had just got their name: {campaign.looked_at}, half-written: {campaign.half_written}."
        f" Rows that an earlier attempt had saved: {campaign.kept}, of them made again: {campaign.twice}."
        f" Runs of Snakemake after a failure: {campaign.reruns}."
    )
    if campaign.faults or campaign.lost or campaign.doubled:
        sys.exit("\n".join(["error: not as the unharmed run", *campaign.faults]))


if __name__ == "__main__":
    main()
