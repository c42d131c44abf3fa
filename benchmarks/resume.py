"""A full-size fine-tune under ZeRO-3 that is killed and goes on: the loss curve must go on as well.

python benchmarks/resume.py [--gpus 2] [--batch 4] [--steps 32] [--save 20] [--kill 24] [--layers N] [--folder FOLDER]
                            [--method full] [--seconds S] [--out FOLDER] [--tiny]

LLaVA-1.5-7B with random weights, the stage's own command line. After step `--kill` all processes get SIGKILL, as from a node
that fails; the same command is then started again. The figure shows the loss before the kill, and after it from the checkpoint
on: steps that both runs made must agree.

A checkpoint takes 12 bytes for each weight that is trained, 82 GB; that at `--save` is the only one. With the model before and
after, 14 GB each, FOLDER takes 110 GB; /dev/shm is the fastest where there is twice the memory. `--layers 16` halves all.
What is there when `--seconds` are over is drawn and printed.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import TextIO

import common

from surf import cli, config, tables

STEP = re.compile(r"step (\d+)/\d+  loss ([\d.]+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="samples a GPU and step")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--save", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--kill", type=int, default=24, help="step after which all processes are killed")
    parser.add_argument("--layers", type=int, help="layers of the language model, if not all 32")
    parser.add_argument("--method", default="full", choices=("full", "lora", "qlora"), help="the last two under ZeRO-2")
    parser.add_argument("--folder", type=Path, help="where a new folder for model and checkpoints is made")
    parser.add_argument("--seconds", type=float, default=1e5, help="end after so many seconds")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of resume.svg, resume.json and resume.log")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: shows that the command works")
    args = parser.parse_args()
    clock = _Clock(args.seconds)
    folder = Path(mkdtemp(dir=args.folder, prefix="surf-resume-"))
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        compare(args, folder, clock)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compare(args: argparse.Namespace, folder: Path, clock: "_Clock") -> None:
    """Both runs; figure and table."""
    batch = 2 if args.tiny else args.batch
    # the weights are made in a process of their own, which gives all its memory back
    what = f"{args.tiny}, {args.steps * batch * args.gpus}, {args.layers}"
    call = f"import llava, pathlib; llava.write(pathlib.Path({str(folder)!r}), {what})"
    subprocess.run([sys.executable, "-c", call], cwd=Path(__file__).parent, check=True)
    clock.say("the model is written")
    stage = 3 if args.method == "full" else 2
    how = {"method": args.method, "zero_stage": stage, "processes": args.gpus, "batch_size": batch}
    sections = {
        "finetune": config.Finetune(**how, epochs=1, save_steps=args.save, learning_rate=1e-5),
        "lvlm": config.Lvlm(model=str(folder / "base"), dtype="float32" if args.tiny else "bfloat16"),
        "images": config.Images(roots=[str(folder / "images")]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.gpus)]
    command += ["-m", "surf.finetune", "--pairs", str(folder / "pairs.parquet"), "--out", str(folder / "model"), "--seed", "0"]
    command += shlex.split(f"{cli.flags(**sections)} {cli.knobs(**sections)}")

    with open(args.out / "resume.log", "w") as log:
        before = losses(command, clock, log, kill_after=args.kill)
        clock.say(f"killed after step {max(before, default=0)}")
        saved = folder / "model" / "_checkpoints" / f"checkpoint-{args.save}"
        size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
        after = losses(command, clock, log)
    clock.say(f"the second run has ended after step {max(after, default=0)}")
    (args.out / "resume.json").write_text(json.dumps({"before": before, "after": after}))
    both = sorted(before.keys() & after.keys())
    written = folder / "model" / "model.json"
    trained = f", {json.loads(written.read_text())['trainable_parameters']:,} parameters trained" if written.exists() else ""
    print(f"{common.machine()}; {args.gpus} processes, {args.method}, ZeRO-{stage}, batch {batch} a process{trained}\n")
    rows = [
        ["steps", max(after, default=0)],
        ["killed after step", max(before, default=0)],
        ["went on after step", min(after, default=1) - 1],
        ["steps that both runs made", len(both)],
        ["largest difference of their losses", max((abs(before[step] - after[step]) for step in both), default=0.0)],
        ["loss at the first and the last step", f"{before.get(1, 0):.4f}, {after[max(after)]:.4f}" if after else ""],
        ["checkpoint, GB", size / 1e9],
        ["last step", (args.out / "resume.log").read_text().rpartition(" step ")[2].partition("\n")[0]],
        ["seconds: model written; killed; all", ", ".join(f"{one:.0f}" for one in clock.marks)],
        ["the model has been written", "yes" if written.exists() else "no, time was over"],
    ]
    print(common.table(["", ""], rows), flush=True)
    figure(before, after, args.kill, args.out / "resume.svg")
    if not clock.over():
        assert written.exists() and max(after) == args.steps, f"see {args.out}/resume.log"


class _Clock:
    """Seconds since the start, said aloud at each mark, and how many are left."""

    def __init__(self, seconds: float) -> None:
        self.begin, self.seconds = time.monotonic(), seconds
        self.marks: list[float] = []

    def say(self, what: str) -> None:
        self.marks.append(time.monotonic() - self.begin)
        print(f"{self.marks[-1]:.0f} s: {what}", file=sys.stderr, flush=True)

    def left(self) -> float:
        return max(self.begin + self.seconds - time.monotonic(), 0.0)

    def over(self) -> bool:
        return not self.left()


def losses(command: list[str], clock: _Clock, log: TextIO, kill_after: int | None = None) -> dict[int, float]:
    """Loss of each step that the log shows. After step `kill_after` the whole family of processes is killed at once."""
    found: dict[int, float] = {}
    lines = []
    if clock.over():
        return found
    running = subprocess.Popen(command, cwd=common.ROOT, stderr=subprocess.PIPE, text=True)
    guard = threading.Timer(clock.left(), common.kill, [running])
    guard.start()
    for text in running.stderr or ():
        lines.append(text)
        print(f"{time.monotonic() - clock.begin:.1f} {text}", end="", file=log, flush=True)
        if match := STEP.search(text):
            if not found:
                print(f"{time.monotonic() - clock.begin:.0f} s: {text}", end="", file=sys.stderr, flush=True)
            found[int(match[1])] = float(match[2])
            if int(match[1]) == kill_after:
                common.kill(running)
                break
    guard.cancel()
    if running.wait() and kill_after not in found and not clock.over():
        raise RuntimeError("".join(lines[-30:]))
    return found


def figure(before: dict[int, float], after: dict[int, float], kill: int, path: Path) -> None:
    """Draw both runs into one SVG file."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    canvas = FigureCanvasSVG(Figure(figsize=(6, 3), layout="constrained"))
    axes = canvas.figure.subplots()
    axes.plot(list(before), list(before.values()), "o-", color="#888888", markersize=5, label="until the kill")
    axes.plot(list(after), list(after.values()), ".-", color="#c0392b", label="after going on")
    axes.axvline(kill, color="#888888", linestyle=":", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    tables.save(canvas, path)


if __name__ == "__main__":
    main()
