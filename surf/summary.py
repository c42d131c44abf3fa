"""What became of the jobs: those that failed, and why; those that a killed run left in the queue.

    python -m surf.summary [.snakemake/log/….log]

Snakemake's own log tells all; without an argument the newest one is read. The workflow calls this at the end of a failed run.
"""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from surf.cli import BEGINS

# What SLURM says of a job's end, in the user's words.
STATES = {
    "TIMEOUT": "it ran out of time",
    "DEADLINE": "it ran out of time",
    "OUT_OF_MEMORY": "it ran out of memory",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node failed",
    "CANCELLED": "it was cancelled",
    "PREEMPTED": "it was preempted",
}
# What SLURM's daemons write into a job's log when they end it; it tells more than the state.
CLUES = (
    (re.compile(r"DUE TO TIME LIMIT"), STATES["TIMEOUT"]),
    (re.compile(r"exceeded memory limit|oom[-_]kill", re.I), STATES["OUT_OF_MEMORY"]),
    (re.compile(r"DUE TO NODE FAILURE"), STATES["NODE_FAIL"]),
    (re.compile(r"DUE TO PREEMPTION"), STATES["PREEMPTED"]),
    (re.compile(r"CANCELLED AT"), STATES["CANCELLED"]),
)
# A stage's own message, or the last line of a traceback; Snakemake's exceptions only say that the command failed.
ERROR = re.compile(
    r"^error: (.*)|^(?!CalledProcessError|RuleException|WorkflowError)([A-Za-z_][\w.]*(?:Error|Exception|Interrupt)\b.*)", re.M
)
TAIL = 20_000  # characters at the end of a log that are looked through
FULL = 1_000_000  # free bytes of a disk that is full


@dataclass(frozen=True)
class Failure:
    """One job whose last attempt failed."""

    rule: str
    output: str
    logs: list[str]
    message: str
    attempts: int
    reason: str


def failures(text: str, folder: Path = Path()) -> list[Failure]:
    """Jobs that failed in the end, in order, from Snakemake's log. `folder` is where the paths in it begin."""
    last: dict[str, dict[str, str]] = {}
    attempts: dict[str, int] = {}
    for block in re.split(r"^(?=Error in rule |Finished jobid: )", text, flags=re.M):
        if match := re.match(r"Finished jobid: (\d+)", block):
            last.pop(match[1], None)
        elif match := re.match(r"Error in rule (\w+)", block):
            head = re.match(r".*\n((?: {4}.*\n)*)", block)
            fields = dict(re.findall(r"^    (\w+): (.*)$", head[1] if head else "", re.M))
            number = fields.get("jobid", "")
            attempts[number] = attempts.get(number, 0) + 1
            last[number] = {"rule": match[1], **fields}
    found = []
    for number, fields in last.items():
        logs = fields.get("log", "").removesuffix(" (check log file(s) for error details)")
        paths = [path for path in logs.split(", ") if path]
        message = fields.get("message", "").removeprefix("None")
        output = fields.get("output", "").split(", ")[0]
        found.append(
            Failure(fields["rule"], output, paths, message, attempts[number], why(message, [folder / path for path in paths]))
        )
    return found


def why(message: str, logs: list[Path]) -> str:
    """Why a job failed: from what SLURM says, else from the ends of its logs."""
    tails = [_last_attempt(path.read_text(errors="replace")[-TAIL:]) for path in logs if path.is_file()]
    for pattern, reason in CLUES:
        if any(pattern.search(tail) for tail in tails):
            return reason
    state = re.search(r"status is: '(\w+)", message)
    if state and state[1] in STATES:
        return STATES[state[1]]
    for tail in tails:
        if found := ERROR.findall(tail):
            return str(found[-1][0] or found[-1][1])
    if "sbatch failed" in message:
        return message
    for folder in {path.parent for path in logs if path.parent.is_dir()}:
        if shutil.disk_usage(folder).free < FULL:
            return f"the disk of {folder} is full"
    if any(tail.strip() for tail in tails):
        return f"its log ends with: {next(tail for tail in tails if tail.strip()).strip().splitlines()[-1]}"
    return "its log says nothing: it was killed, or never started"


def _last_attempt(log: str) -> str:
    """What follows the last line that tells of a stage's begin."""
    return re.split(rf"^.* {BEGINS} .*\n", log, flags=re.M)[-1]


def render(failed: list[Failure], command: list[str]) -> str:
    """The summary: what failed, why, where to look, what to type next.

    Args:
        command: what started the run, without its targets.
    """
    if not failed:
        return ""
    lines = [f"{len(failed)} job{'s' * (len(failed) > 1)} failed:"]
    for job in failed:
        tries = f", {job.attempts} attempts" if job.attempts > 1 else ""
        made = f" -> {job.output}" if job.output else ""
        lines += [f"  {job.rule}{made}{tries}", f"    why: {job.reason}"]
        lines += [f"    log: {path}" for path in job.logs]
    # a command without targets is the whole run; `check` again is no use before what it found is mended
    targets = dict.fromkeys(job.output or job.rule for job in failed if job.rule != "check")
    if not targets:
        return "\n".join([*lines, "next: mend what its log calls WRONG, then the same command again."])
    again = shlex.join([command[0], *targets, *command[1:]])
    lines += ["next, just these:", f"  {again}", "or the same command as before, which goes on with everything."]
    return "\n".join(lines)


def show(logs: str | list[str]) -> None:
    """At the end of a failed run: print the summary of Snakemake's log, to stderr."""
    text = "".join(Path(path).read_text(errors="replace") for path in ([logs] if isinstance(logs, str) else logs))
    summary = render(failures(text), command_line())
    if summary:
        print(f"\n{summary}\n", file=sys.stderr)


def command_line() -> list[str]:
    """The command line of this Snakemake without its targets, so that others can be put in their place."""
    from snakemake.cli import get_argument_parser  # type: ignore[import-untyped]

    targets = set(get_argument_parser().parse_known_args(sys.argv[1:])[0].targets)
    return ["snakemake", *(word for word in sys.argv[1:] if word not in targets)]


def leftovers(folder: Path) -> str:
    """Jobs of this workflow that SLURM still holds although no Snakemake waits for them; empty if there are none."""
    command = ["squeue", "--me", "--noheader", "--sort", "i", "--format", "%A|%k|%Z"]  # in the order of their numbers
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"squeue does not answer: {done.stderr.strip()}"
    rows = [line.split("|", 2) for line in done.stdout.splitlines() if line.count("|") >= 2]
    here = folder.resolve()
    ours = [(job, comment) for job, comment, where in rows if comment.startswith("rule_") and Path(where).resolve() == here]
    if not ours:
        return ""
    jobs = " ".join(job for job, _ in ours)
    names = ", ".join(comment.removeprefix("rule_").replace("_wildcards_", " ") for _, comment in ours[:5])
    more = f" and {len(ours) - 5} more" if len(ours) > 5 else ""
    what = f"{len(ours)} job{'s' * (len(ours) > 1)} of an earlier run still in the queue ({names}{more})"
    return f"{what}; next: scancel {jobs}, or wait for their end; then the same command again"


def main() -> None:
    """Command line."""
    if len(sys.argv) > 1:
        log = Path(sys.argv[1])
    else:
        log = max(Path(".snakemake/log").glob("*.log"), default=Path(), key=lambda path: path.stat().st_mtime)
    if not log.is_file():
        sys.exit("error: no log of Snakemake here; expected .snakemake/log/; next: python -m surf.summary LOG")
    print(render(failures(log.read_text(errors="replace")), ["snakemake"]) or "no job failed")


if __name__ == "__main__":
    main()
