"""What a cluster's faults do to a run: strikes while `answer` is at work, lets the run go on, and compares the result.

    python tests/slurm/faults.py [NAME…]        prints the table of docs/cluster.md

Each fault has a cluster and a copy of the project (in /var/tmp) of its own; the rounds are there already. It strikes as soon as
`answer` has saved some rows. Batches are of one row here, so that a part takes some seconds.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
from cluster import Cluster, copy_of_the_project, install, obstacle

FLUSH = 16
CONFIG = ["--config", f"answer={{flush_rows: {FLUSH}}}", "lvlm={batch_size: 1}"]
WORKERS = 3  # faults at a time
FAST = ["--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "5"]
SLURM = ["answers", "--profile", "slurm", *FAST]


class Run:
    """One run of the workflow on the cluster, and what was seen of it."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        cluster.environment["SURF_LOST_AFTER"] = "40"
        self.saved: dict[str, list[str]] = {}  # rows of every file of unfinished work
        self.states: dict[str, list[str]] = {}  # what squeue said of each job of `answer`, changes only
        self.notes: list[str] = []
        self.process: subprocess.Popen | None = None
        self.options: list[str] = []

    def start(self) -> None:
        """Start snakemake, as before."""
        self.process = self.cluster.snakemake(self.folder, *SLURM, *self.options, *CONFIG)

    def look(self) -> None:
        """Note what the queue and the folder of unfinished work hold now."""
        with suppress(OSError):  # files and folders go when their part is finished
            for path in (self.folder / "results/answers/_partial").rglob("[!.]*.parquet"):
                if path.name not in self.saved:
                    self.saved[path.name] = pq.read_table(path, columns=["round_id"])["round_id"].to_pylist()
        for line in self.cluster.call("squeue", "-h", "-t", "all", "-o", "%A|%k|%T|%N|%Z").stdout.splitlines():
            number, comment, state, node, folder = line.split("|")
            if comment.startswith("rule_answer") and folder == str(self.folder):
                now = f"{state} on {node}" if state == "RUNNING" else state
                seen = self.states.setdefault(number, [])
                if state not in ("COMPLETING", "CONFIGURING") and (not seen or seen[-1] != now):
                    seen.append(now)

    def until(self, ready: Callable[[], object], seconds: float = 2700) -> None:
        """Look on until `ready`."""
        end = time.monotonic() + seconds
        while not ready():
            self.look()
            if time.monotonic() > end:
                raise TimeoutError(f"{self.folder}: {self.states}\n{(self.folder / 'output.txt').read_text()[-3000:]}")
            time.sleep(0.1)

    def pause(self, seconds: float) -> None:
        """Look on for a while, or until snakemake ends."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() > end or (self.process and self.process.poll() is not None))

    def wait(self) -> int:
        """Look on until snakemake ends; its exit code."""
        assert self.process
        self.until(lambda: self.process.poll() is not None)
        return self.process.returncode

    def said(self, words: str) -> str:
        """The first line of snakemake's output that holds these words, or nothing."""
        return next((line for line in (self.folder / "output.txt").read_text().splitlines() if words in line), "")

    def part(self, job: str) -> str:
        """The part that a job makes."""
        return self.cluster.jobs("all")[job][0].rsplit("_", 1)[-1]

    def stages(self) -> list[int]:
        """Process ids of the stage at work in this folder."""
        found = []
        for proc in Path("/proc").glob("[0-9]*"):
            try:
                words = (proc / "cmdline").read_bytes().split(b"\0")
                if b"surf.answer" in words and words[0].endswith(b"python") and (proc / "cwd").resolve() == self.folder:
                    found.append(int(proc.name))
            except OSError:
                continue
        return found


# --- the faults: called when rows have been saved ---------------------------------------------------------------------


def running(run: Run) -> tuple[str, str]:
    """A running job of `answer` and its node."""
    return next((job, node) for job, (comment, node) in run.cluster.jobs().items() if comment.startswith("rule_answer"))


def power_cut(run: Run) -> None:
    _, node = running(run)
    run.cluster.stop(node)
    run.notes.append(f"{node} gone for 20 s")
    run.pause(20)
    run.cluster.boot(node)


def slurmd_killed(run: Run) -> None:
    _, node = running(run)
    run.cluster.crash_slurmd(node)
    run.pause(5)
    run.cluster.restart_slurmd(node)


def hangs(run: Run) -> None:
    for pid in run.stages():
        os.kill(pid, signal.SIGSTOP)
    run.notes.append("stages stopped, so that they never end")


def preempted(run: Run) -> None:
    _, node = running(run)
    words = ["--partition", "urgent", "--nodelist", node, "--gres", "gpu:2", "--output", "/dev/null", "--wrap", "sleep 10"]
    done = run.cluster.call("sbatch", "--parsable", *words)
    run.notes.append(f"job {done.stdout.strip()}, of a partition of higher priority, takes both GPUs of {node} for 10 s")


def cancelled(run: Run) -> None:
    job, _ = running(run)
    run.cluster.call("scancel", job)


def controller_restarted(run: Run) -> None:
    run.cluster.stop("slurmctld")
    time.sleep(15)
    run.cluster.start_controller()


def snakemake_killed(run: Run) -> None:
    for job in run.cluster.jobs():
        run.cluster.call("scontrol", "suspend", job)  # or they would be done before the rerun starts
    run.process.kill()
    run.process.wait()
    unlock = run.cluster.snakemake(run.folder, "--unlock", "--profile", "slurm")
    unlock.wait()
    run.start()
    if run.wait() == 0:
        raise AssertionError("the rerun did not see the jobs that were left over")
    line = run.said("still in the queue")
    run.notes.append("rerun refused: “" + line.split(" (")[0] + " …”, they were cancelled")
    run.cluster.call("scancel", *run.cluster.jobs("R,S,PD"))
    run.until(lambda: not run.cluster.jobs("R,S,PD,CG"))
    run.start()


def interrupted(run: Run) -> None:
    run.process.send_signal(signal.SIGINT)
    code = run.wait()
    left = run.cluster.jobs("R,PD")
    run.notes.append(f"exit code {code}, {len(left)} jobs left in the queue, then the same command again")
    run.start()


def forgotten(run: Run) -> None:
    """The controller keeps no ended job, so the plugin asks sacct, which knows nothing here, and no longer sees its jobs."""
    with open(run.cluster.state / "etc/slurm.conf", "a") as file:
        file.write("MinJobAge=2\n")
    run.cluster.call("scontrol", "reconfigure")
    if run.wait() == 0:
        raise AssertionError("snakemake saw its jobs all the same")
    with open(run.cluster.state / "etc/slurm.conf", "a") as file:
        file.write("MinJobAge=300\n")
    run.cluster.call("scontrol", "reconfigure")  # the same command follows, on a controller that remembers


def storm(run: Run) -> None:
    """Nodes and daemons die at random moments, until the run is done or eight have."""
    draw, struck = random.Random(1), Counter()
    for _ in range(8):
        run.pause(draw.expovariate(1 / 8))
        if run.process and run.process.poll() is not None:
            break
        what = draw.choice(["node", "slurmd", "slurmctld"])
        node = draw.choice([node for _, node in run.cluster.jobs().values()] or run.cluster.nodes)
        struck[what] += 1
        if what == "node":
            run.cluster.stop(node)
            run.pause(10)
            run.cluster.boot(node)
        elif what == "slurmd":
            run.cluster.crash_slurmd(node)
            run.pause(5)
            run.cluster.restart_slurmd(node)
        else:
            run.cluster.stop("slurmctld")
            run.pause(5)
            run.cluster.start_controller()
    run.notes.append("died: " + ", ".join(f"{what} {count} times" for what, count in sorted(struck.items())))


def nothing(run: Run) -> None:
    pass


# name: (the fault in words, options of snakemake, what strikes)
FAULTS: dict[str, tuple[str, list[str], Callable[[Run], None]]] = {
    "node": ("the node of a job loses power", [], power_cut),
    "slurmd": ("slurmd is killed, its job is not; restarted after 5 s", [], slurmd_killed),
    "time": ("jobs hang until their time limit (1 minute for the first attempt)", ["answer:runtime=9*attempt-8"], hangs),
    "memory": (
        "jobs need more memory than they asked for (600 MB for the first attempt)",
        ["answer:mem_mb=600*attempt"],
        nothing,
    ),
    "preempt": ("jobs are preempted, with requeue", [], preempted),
    "scancel": ("scancel by hand", [], cancelled),
    "slurmctld": ("slurmctld is down for 15 s", [], controller_restarted),
    "kill": ("snakemake is killed (SIGKILL) and run again", [], snakemake_killed),
    "storm": ("nodes (for 10 s), slurmd and slurmctld (for 5 s) die at random moments", [], storm),
    "forget": ("slurmctld forgets jobs before snakemake has seen their end", [], forgotten),
    "ctrl-c": ("Ctrl-C, then the same command again", [], interrupted),
}


def strike(run: Run, name: str, truth: Path) -> list[str]:
    """Run with one fault; the row of the table."""
    title, resources, fault = FAULTS[name]
    if resources:
        run.options = ["--set-resources", *resources]
    run.start()
    if fault is not nothing:
        run.until(lambda: sum(map(len, run.saved.values())) >= 3 * FLUSH)
    before = {row for rows in run.saved.values() for row in rows}
    fault(run)
    code = run.wait()
    if code and (line := run.said("SLURM has forgotten")):  # as it says itself
        run.notes.append(f"snakemake ended by itself: “{line.partition(',')[0]} …”, then the same command again")
        run.start()
        code = run.wait()
    rows = [row for rows in run.saved.values() for row in rows]
    twice = len(rows) - len(set(rows))
    results = run.folder / "results"
    same = all((results / "answers" / path.name).read_bytes() == path.read_bytes() for path in truth.glob("*.parquet"))
    strays = [path.name for pattern in ("*.tmp", "_partial") for path in results.rglob(pattern)]
    seen = "; ".join(f"job {job}: {', '.join(states).lower()}" for job, states in run.states.items())
    happened = ". ".join([*run.notes, seen])
    same_text = "yes" if same and code == 0 and not strays else f"NO (exit code {code}, {strays})"
    return [title, happened, str(len(before)), str(twice), same_text]


def main() -> None:
    """Command line."""
    if why := obstacle():
        sys.exit(f"error: {why}")
    install()
    names = sys.argv[1:] or list(FAULTS)
    base = Path(tempfile.mkdtemp(prefix="surf-faults-", dir="/var/tmp"))
    try:
        fresh = copy_of_the_project(base / "fresh")
        local = [sys.executable, "-m", "snakemake", "--profile", "profiles/local", *CONFIG]
        quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([*local[:3], "rounds", *local[3:]], cwd=fresh, **quiet)
        unharmed = shutil.copytree(fresh, base / "unharmed", symlinks=True)
        subprocess.run([*local[:3], "answers", *local[3:]], cwd=unharmed, **quiet)
        truth = unharmed / "results/answers"
        total = sum(pq.read_metadata(path).num_rows for path in truth.glob("*.parquet"))
        head = ["Fault", "What was seen", "Rows saved when it struck", "of them made again", "Result equal"]
        table = [head, ["---"] * len(head)]

        def one(name: str) -> list[str]:
            folder = shutil.copytree(fresh, base / name, symlinks=True)
            with Cluster() as cluster:
                run = Run(cluster, folder)
                try:
                    row = strike(run, name, truth)
                except (AssertionError, OSError, StopIteration, TimeoutError) as error:
                    row = [FAULTS[name][0], f"{type(error).__name__}: {error}", "", "", "NO"]
                finally:
                    if run.process and run.process.poll() is None:
                        run.process.kill()
            print(f"{name}: {row}", file=sys.stderr, flush=True)
            return row

        with ThreadPoolExecutor(WORKERS) as pool:
            table += pool.map(one, names)
        print(f"`answer` over 2 parts, {total} rows, saved every {FLUSH} rows; each fault on a fresh cluster of 4 nodes.\n")
        for row in table:
            print(f"| {' | '.join(row)} |")
        if any(row[4] != "yes" for row in table[2:]):
            sys.exit(1)
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
