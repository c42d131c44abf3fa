"""Runs stages of the example one by one, by their own commands, and harms them.

A stage is a fork of this process, which has loaded torch and the other libraries once: so a hundred kills take minutes. The
fork runs the very module with the very flags that Snakemake would, as `python -m` does. Training is started by torchrun.
"""

import json
import logging
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from small import Example, Job

from surf import cli, store

SIGNALS = {"SIGKILL": 4, "SIGTERM": 2, "SIGUSR1": 2, "SIGINT": 2}  # how often each is drawn
SLACK = 4096  # bytes that a full disk still has
RESUMING = ("embed", "answer", "reanswer", "evaluate_answer")


class Runner:
    """Runs the jobs of one example, in order."""

    def __init__(self, example: Example, seed: int) -> None:
        self.example, self.draw = example, random.Random(seed)
        self.events: Counter = Counter()  # (rule, what happened): how often
        self.faults: list[str] = []  # what must not happen
        self.seconds: dict[str, float] = {}
        self.codes: dict[int, int] = {}  # exit codes of processes that have ended

    # --- one attempt ------------------------------------------------------------------------------------------------------

    def start(self, job: Job) -> int:
        """Start a job in a session of its own; its process id."""
        words, log = _words(job.command, self.example.folder)
        log.parent.mkdir(parents=True, exist_ok=True)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.chdir(self.example.folder)
            if words[:2] == ["python", "-m"]:
                become(lambda: _module(words[2:]), log)
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            os.execvpe("bash", ["bash", "-c", f"set -euo pipefail; {job.command}"], {**os.environ, "PATH": path})
        return pid

    def wait(self, pid: int, seconds: float = 900) -> int | None:
        """The exit code (negative: the signal's number); None if it is still at work after so many seconds."""
        end = time.monotonic() + seconds
        while pid not in self.codes:
            self.example.look()
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() >= end:
                return None
            time.sleep(min(0.02, max(0.0, end - time.monotonic())))
        return self.codes[pid]

    def finish(self, job: Job) -> bool:
        """Run a job to its end, as often as its own message asks for; whether that can be done."""
        for _ in range(5):
            begun = time.monotonic()
            pid = self.start(job)
            code = self.wait(pid)
            if code is None:
                os.killpg(pid, signal.SIGKILL)
                self.wait(pid)
                self.faults.append(f"{job.output}: hangs")
                return False
            if code == 0:
                self.seconds.setdefault(job.output, time.monotonic() - begun)
                return True
            tail = self.log(job)
            if "is training this model" in tail:  # orphans of a killed torchrun: do as it says
                self.events[job.rule, "refused"] += 1
                self.end_orphans()
                continue
            self.faults.append(f"{job.output}: exit code {code}: {tail[-500:]}")
            return False
        self.faults.append(f"{job.output}: was never finished")
        return False

    def end_orphans(self) -> None:
        """End processes that a killed parent left in this folder, and wait until they are gone."""
        for _ in range(100):
            left = self.example.processes()
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            if not left:
                return
            time.sleep(0.1)

    def said(self, job: Job) -> str:
        """What all attempts of a job wrote."""
        path = _words(job.command, self.example.folder)[1]
        return path.read_text(errors="replace") if path.is_file() else ""

    def log(self, job: Job) -> str:
        """What the last attempt wrote."""
        return re.split(rf"^.* {cli.BEGINS} .*\n", self.said(job), flags=re.M)[-1]

    # --- harms: each leaves the job unfinished, or done; `finish` follows -----------------------------------------------------

    def kill(self, job: Job) -> None:
        """A signal, at a random moment of the time that the job takes unharmed."""
        name = self.draw.choices(list(SIGNALS), SIGNALS.values())[0]
        number = signal.Signals[name]
        whole_group = self.draw.random() < 0.3
        before = len(self.said(job))
        pid = self.start(job)
        code = self.wait(pid, self.draw.uniform(0, self.seconds.get(job.output, 1.0)))
        if code is not None:
            self.events[job.rule, "came too late"] += 1
            if job.rule == "finetune":  # it would not train again
                shutil.rmtree(self.example.results / "model", ignore_errors=True)
            return
        members = sorted(self.example.processes()) or [pid]
        for victim in members if whole_group else [self.draw.choice(members)]:
            with suppress(ProcessLookupError):
                os.kill(victim, number)
        # where one of several processes that train is struck, torchrun gives the others ten minutes to save and end
        patience = 660 if job.rule == "finetune" else 120
        code = self.wait(pid, patience)
        if code is None:
            self.faults.append(f"{job.output}: goes on {patience} s after {name}")
            os.killpg(pid, signal.SIGKILL)
            self.wait(pid)
        self.events[job.rule, name] += 1
        said = self.said(job)[before:]
        if job.rule != "finetune" and code not in (-number, 128 + number, 0):
            self.faults.append(f"{job.output}: exit code {code} after {name}: {said[-500:]}")
        if job.rule != "finetune" and cli.BEGINS in said and name != "SIGKILL" and "Traceback" in said:
            self.faults.append(f"{job.output}: a traceback after {name}: {said[-800:]}")

    def second_writer(self, job: Job) -> None:
        """The same job twice at the same time; sometimes one of them is killed."""
        pids = [self.start(job)]
        time.sleep(self.draw.uniform(0, self.seconds.get(job.output, 1.0)))
        pids.append(self.start(job))
        if self.draw.random() < 0.5:
            time.sleep(self.draw.uniform(0, self.seconds.get(job.output, 1.0)))
            with suppress(ProcessLookupError):
                os.kill(self.draw.choice(pids), signal.SIGKILL)
        codes = [self.wait(pid) for pid in pids]
        self.events[job.rule, "second writer"] += 1
        if set(codes) - {0, -signal.SIGKILL}:
            self.faults.append(f"{job.output}: exit codes {codes} of two writers: {self.log(job)[-500:]}")

    def full_disk(self, job: Job) -> None:
        """The disk of the results is full, and later has room again. Only where it is a mount of its own."""
        usage = shutil.disk_usage(self.example.results)
        pages = (usage.used + SLACK) // 4096
        _remount(self.example.results, f"nr_blocks={pages}")
        code = self.wait(self.start(job))
        _remount(self.example.results, "nr_blocks=65536")
        if code:
            self.events[job.rule, "full disk"] += 1
        temporary = list(self.example.results.rglob("*.tmp"))
        if temporary:
            self.faults.append(f"{job.output}: left {temporary[0].name} on a full disk")

    def torn_piece(self, job: Job) -> None:
        """A saved piece of unfinished work is truncated."""
        pid = self.start(job)
        self.wait(pid, self.seconds.get(job.output, 1.0) * self.draw.uniform(0.5, 1))
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        self.wait(pid, 60)
        name = Path(job.output)
        saved = self.example.folder / name.parent / "_partial"  # a job of `evaluate_answer` writes several parts
        pieces = sorted((saved if name.suffix == ".json" else saved / name.stem).rglob("[!.]*.parquet"))
        if pieces:
            piece = self.draw.choice(pieces)
            self.example.truncate(piece, self.draw.randrange(piece.stat().st_size))
            self.events[job.rule, "truncated piece"] += 1

    def torn_checkpoint(self, job: Job) -> None:
        """Training is killed when it has saved a checkpoint, and a file of the last one is truncated."""
        checkpoints = self.example.results / "model/_checkpoints"
        shutil.rmtree(checkpoints, ignore_errors=True)  # or there may be too little left to train
        pid = self.start(job)
        while self.wait(pid, 0) is None and len(list(checkpoints.glob("checkpoint-*/_whole"))) < 2:
            time.sleep(0.05)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        self.end_orphans()
        self.wait(pid, 60)
        whole = sorted(checkpoints.glob("checkpoint-*/_whole"), key=lambda path: int(path.parent.name.split("-")[1]))
        if whole:
            files = [path for path in whole[-1].parent.rglob("*") if path.is_file() and path.stat().st_size > 1]
            victim = self.draw.choice(sorted(files))
            self.example.truncate(victim, self.draw.randrange(victim.stat().st_size))
            self.events[job.rule, "truncated checkpoint"] += 1

    def missing_image(self, job: Job) -> None:
        """An image is gone while the job is at work: its rows go into quarantine, no other row does; then it comes back."""
        folder = self.example.folder
        rounds = store.rows(store.read_table(self.example.results / "rounds" / Path(job.output).name, "rounds"))
        images = sorted({row["image"] for row in rounds if (folder / "example/images" / row["image"]).is_file()})
        name = self.draw.choice(images)
        path, aside = folder / "example/images" / name, folder / "aside.jpg"
        saved = self.example.saved(folder / job.output)
        path.rename(aside)
        code = self.wait(self.start(job))
        aside.rename(path)
        self.events[job.rule, "missing image"] += 1
        gone = {row["round_id"] for row in rounds if row["image"] == name}
        if code:
            if "images.max_bad_share" not in self.log(job):
                self.faults.append(f"{job.output}: exit code {code} without an image: {self.log(job)[-500:]}")
            return
        answered = {row["round_id"] for row in store.rows(store.read_table(folder / job.output, "answers"))}
        bad = {row["key"] for row in store.rows(store.read_table(_flag(job, "quarantine", folder), "quarantine"))}
        if not gone - saved <= bad or answered | bad != {row["round_id"] for row in rounds} or answered & bad:
            self.faults.append(f"{job.output}: rows of a missing image are not accounted for")


def run(
    example: Example, jobs: list[Job], *, seed: int, kills: int = 0, training: int = 0, others: bool = False, seconds: dict
) -> dict:
    """Run all jobs, with this many kills, `training` of them in the fine-tune, and perhaps the other harms.

    Args:
        seconds: how long each job takes, by its output.
    """
    runner = Runner(example, seed)
    runner.seconds = seconds
    rest = [job for job in jobs if "python -m" in job.command and job.rule != "finetune"]
    plan = Counter(runner.draw.choices(rest, k=kills - training) if kills > training else [])
    plan.update({job: training for job in jobs if job.rule == "finetune"})
    for job in jobs:
        for _ in range(plan[job]):
            runner.kill(job)
        if others:
            for harm in _others(job, example):
                getattr(runner, harm)(job)
        if not runner.finish(job):  # what follows would only say so again
            break
    twice, kept = example.made_twice(), example.kept()
    store.sweep(example.results)
    events = [[rule, what, count] for (rule, what), count in runner.events.items()]
    looks = {"looked_at": example.looked_at(), "half_written": example.half_written}
    return {"events": events, "faults": runner.faults, "seconds": runner.seconds, "twice": twice, "kept": kept, **looks}


def _others(job: Job, example: Example) -> list[str]:
    """Harms that are no kills, for a job."""
    if job.rule == "finetune":
        return ["torn_checkpoint"]
    harms = ["full_disk"] if os.path.ismount(example.results) and job.rule not in ("resolved_config", "demo") else []
    if job.rule == "answer":
        harms += ["missing_image"]
    if job.rule in RESUMING:
        harms += ["torn_piece", "second_writer"]
    if job.rule in ("score", "retrieve", "pair", "merge", "catalog"):
        harms += ["second_writer"]
    return harms


# --- inside -------------------------------------------------------------------------------------------------------------------


def _words(command: str, folder: Path) -> tuple[list[str], Path]:
    """The words of a shell command, and the log that it writes to."""
    command, _, log = command.partition(" >> ")
    command = re.sub(r"\$\(dirname ([^)]*)\)", lambda match: str(Path(match[1]).parent), command)
    return shlex.split(command), folder / (log.split()[0] if log else "results/logs/none.log")


def _flag(job: Job, name: str, folder: Path) -> Path:
    words = _words(job.command, folder)[0]
    return folder / words[words.index(f"--{name}") + 1]


def become(program: Callable[[], object], log: Path) -> NoReturn:
    """Be the process of a program that appends what it says to `log`, to its end."""
    code = 1
    try:
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = os.fdopen(1, "w")
        sys.stderr = os.fdopen(2, "w", buffering=1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        logging.getLogger().handlers.clear()
        program()
        code = 0
    except KeyboardInterrupt:  # before the stage began: die of it, as Python does
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        with suppress(BaseException):
            traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(BaseException):
                stream.flush()
        os._exit(code)


def _module(words: list[str]) -> None:
    """`python -m MODULE WORD…`"""
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def _remount(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{size}", str(folder)], check=True)


def preload() -> None:
    """Load once what most stages load, but nothing of surf, which runs as a program."""
    import transformers.models.clip.modeling_clip
    import transformers.models.llava.modeling_llava  # noqa: F401


def main() -> None:
    """As a program: read a task as JSON from stdin, print what came of it as JSON in the last line."""
    task = json.load(sys.stdin)
    example, jobs = Example(Path(task.pop("folder"))), [Job(*job) for job in task.pop("jobs")]
    preload()
    print(json.dumps(run(example, jobs, **task)))


if __name__ == "__main__":
    main()
