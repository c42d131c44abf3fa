"""A full-size fine-tune under ZeRO-3 that is killed and goes on: the loss curve must go on as well.

python benchmarks/resume.py [--gpus 2] [--steps 36] [--save 20] [--kill 24] [--folder FOLDER] [--figure FILE] [--tiny]

LLaVA-1.5-7B with random weights, the stage's own command line. After step `--kill` all processes get SIGKILL, as from a node
that fails; the same command is then started again. A checkpoint takes 95 GB, so the one at `--save` is the only one of a run of
36 steps. The figure shows the loss before the kill, and after it from the checkpoint on: steps that both runs made must agree.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from tempfile import mkdtemp

import common

from surf import cli, config

STEP = re.compile(r"step (\d+)/\d+  loss ([\d.]+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="samples a GPU and step")
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--save", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--kill", type=int, default=24, help="step after which all processes are killed")
    parser.add_argument("--folder", type=Path, help="where model and checkpoints lie: 125 GB; a temporary folder if left out")
    parser.add_argument("--figure", type=Path, default=Path("resume.svg"))
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: shows that the command works")
    args = parser.parse_args()
    folder = args.folder or Path(mkdtemp())
    batch = 2 if args.tiny else args.batch
    # the weights are made in a process of their own, which gives all its memory back
    call = f"import llava, pathlib; llava.write(pathlib.Path({str(folder)!r}), {args.tiny}, {args.steps * batch * args.gpus})"
    subprocess.run([sys.executable, "-c", call], cwd=Path(__file__).parent, check=True)
    sections = {
        "finetune": config.Finetune(processes=args.gpus, batch_size=batch, epochs=1, save_steps=args.save, learning_rate=1e-5),
        "lvlm": config.Lvlm(model=str(folder / "base"), dtype="float32" if args.tiny else "bfloat16"),
        "images": config.Images(roots=[str(folder / "images")]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.gpus)]
    command += ["-m", "surf.finetune", "--pairs", str(folder / "pairs.parquet"), "--out", str(folder / "model"), "--seed", "0"]
    command += shlex.split(f"{cli.flags(**sections)} {cli.knobs(**sections)}")

    begin = time.monotonic()
    before = losses(command, kill_after=args.kill)
    killed = time.monotonic()
    after = losses(command)
    written = json.loads((folder / "model" / "model.json").read_text())
    assert written["steps"] == args.steps == max(after), written["steps"]
    both = sorted(before.keys() & after.keys())
    figure(before, after, args.kill, args.figure)
    print(f"{common.machine()}; {args.gpus} processes, ZeRO-3, {written['trainable_parameters']:,} parameters trained\n")
    rows = [
        ["steps", written["steps"]],
        ["killed after step", max(before)],
        ["went on after step", min(after) - 1],
        ["steps that both runs made", len(both)],
        ["largest difference of their losses", max((abs(before[step] - after[step]) for step in both), default=0.0)],
        ["loss at the first and the last step", f"{written['loss_curve'][0]['loss']:.4f}, {written['loss']:.4f}"],
        ["seconds until the kill, from there to the end", f"{killed - begin:.0f}, {time.monotonic() - killed:.0f}"],
    ]
    print(common.table(["", ""], rows))


def losses(command: list[str], kill_after: int | None = None) -> dict[int, float]:
    """Loss of each step that the log shows. After step `kill_after` the whole family of processes is killed at once."""
    found: dict[int, float] = {}
    lines = []
    running = subprocess.Popen(command, cwd=common.ROOT, stderr=subprocess.PIPE, text=True)
    for text in running.stderr or ():
        lines.append(text)
        if match := STEP.search(text):
            found[int(match[1])] = float(match[2])
            if int(match[1]) == kill_after:
                common.kill(running)
                break
    if running.wait() and kill_after is None:
        raise RuntimeError("".join(lines[-30:]))
    return found


def figure(before: dict[int, float], after: dict[int, float], kill: int, path: Path) -> None:
    """Draw both runs into one SVG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "surf"
    drawing, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(list(before), list(before.values()), "o-", color="#888888", markersize=5, label="until the kill")
    axes.plot(list(after), list(after.values()), ".-", color="#c0392b", label="after going on")
    axes.axvline(kill, color="#888888", linestyle=":", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    drawing.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
