"""The whole example through Snakemake, struck at random moments; after each failure its own advice is followed."""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress

from small import SNAKEMAKE, Example

PROGRAM = [sys.executable, "-m", "snakemake"]
TARGETS = {"stage": 6, "job": 2, "snakemake": 2, "ctrl-c": 1}  # how often each is struck
PAUSE = 8.0  # mean seconds between two strikes
RULES = {
    "evaluate answer": "evaluate_answer",
    "evaluate questions": "evaluate_questions",
    "candidates": "evaluate_candidates",
    "pope table": "pope",
    "demo.world": "demo",
}


class Attacked:
    """A run that is struck, and run again, until it is finished."""

    def __init__(self, example: Example, seed: int, kills: int) -> None:
        self.example, self.draw, self.left = example, random.Random(seed), kills
        self.events: Counter = Counter()  # (rule, what happened): how often
        self.faults: list[str] = []
        self.truncations = ["part", "manifest"]
        self.reruns = 0

    def finish(self) -> None:
        """Run, and run again as Snakemake and the summary say."""
        full = [*PROGRAM, *SNAKEMAKE]
        command = full
        for _ in range(4 * self.left + 30):
            code, text = self.attempt(command)
            if code == 0 and command == full:
                break
            self.reruns += 1
            if code:
                self.truncate()
            command = self.advice(text, full) if code else full
        else:
            self.faults.append(f"never finished: {text[-3000:]}")
        end = time.monotonic() + 120
        while self.example.processes() and time.monotonic() < end:  # orphans write what is there already
            time.sleep(0.2)

    def attempt(self, command: list[str]) -> tuple[int, str]:
        """One run of Snakemake, and what it printed."""
        path = self.example.folder / "output.txt"
        with open(path, "wb") as output:
            process = subprocess.Popen(
                ["env", "--default-signal=INT", *command],
                cwd=self.example.folder,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        moment = time.monotonic() + self.draw.expovariate(1 / PAUSE)
        while process.poll() is None:
            self.example.look()
            if self.left and time.monotonic() >= moment:
                self.strike(process)
                moment = time.monotonic() + self.draw.expovariate(1 / PAUSE)
            time.sleep(0.1)
        return process.returncode, path.read_text(errors="replace")

    def strike(self, process: subprocess.Popen) -> None:
        """A signal to a stage, to all of a job, or to Snakemake."""
        target = self.draw.choices(list(TARGETS), TARGETS.values())[0]
        name = self.draw.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGUSR1", "SIGINT"])
        stages = {pid: rule for pid, words in self.example.processes().items() if (rule := rule_of(words))}
        if target in ("stage", "job"):
            if not stages:
                return
            pid = self.draw.choice(sorted(stages))
            rule = stages[pid]
            for victim in [pid] if target == "stage" else [one for one in stages if stages[one] == rule]:
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.Signals[name])
        elif target == "snakemake":
            rule, name = "snakemake", self.draw.choice(["SIGKILL", "SIGTERM"])
            process.send_signal(signal.Signals[name])
        else:  # a terminal's Ctrl-C reaches Snakemake and its jobs
            rule, name = "snakemake", "SIGINT"
            os.killpg(process.pid, signal.SIGINT)
        self.events[rule, name] += 1
        self.left -= 1

    def truncate(self) -> None:
        """Once a part and once a manifest, while no job is at work."""
        names = {"part": "*/part-*.parquet", "manifest": "*/_manifest.json"}
        for kind in list(self.truncations):
            files = sorted(self.example.results.glob(names[kind]))
            files = [path for path in files if path.parent.name not in ("quarantine", "logs")]
            if files:
                victim = self.draw.choice(files)
                self.example.truncate(victim, self.draw.randrange(victim.stat().st_size))
                self.events[victim.parent.name, f"truncated {kind}"] += 1
                self.truncations.remove(kind)
                return

    def advice(self, text: str, full: list[str]) -> list[str]:
        """The command that the output tells to type next."""
        if "--unlock" in text:
            subprocess.run([*PROGRAM, *SNAKEMAKE, "--unlock"], cwd=self.example.folder, capture_output=True, check=False)
            return full
        if "is training this model" in text:  # end it, or wait for its end
            while any(rule_of(words) == "finetune" for words in self.example.processes().values()):
                time.sleep(0.5)
            return full
        torn = re.findall(r"next: rm (.+?), then your snakemake command again", text)
        if torn:
            for name in " ".join(torn).split():
                (self.example.folder / name).unlink(missing_ok=True)
            return full
        if found := re.search(r"^next, just these:\n  snakemake (.*)$", text, re.M):
            return [*PROGRAM, *shlex.split(found[1])]
        return full


def rule_of(words: list[str]) -> str:
    """The rule whose stage a process is; empty if it is none."""
    if "-m" not in words[:-1]:
        return ""
    module = words[words.index("-m") + 1]
    if module.startswith("torch.") or "torchrun" in " ".join(words[:3]):
        return "finetune"
    if not module.startswith("surf."):
        return ""
    name = module.removeprefix("surf.")
    if name in ("evaluate", "pope"):
        name = f"{name} {words[words.index('-m') + 2]}"
    if "evaluate/questions" in words and name == "retrieve":
        return "evaluate_retrieve"
    return RULES.get(name, name)


def run(example: Example, *, seed: int, kills: int) -> dict:
    """A life through Snakemake; what struck it and what must not have happened."""
    attacked = Attacked(example, seed, kills)
    attacked.finish()
    events = [[rule, what, count] for (rule, what), count in attacked.events.items()]
    twice, kept = example.made_twice(), example.kept()
    looks = {"looked_at": example.looked_at(), "half_written": example.half_written}
    return {"events": events, "faults": attacked.faults, "reruns": attacked.reruns, "twice": twice, "kept": kept, **looks}
