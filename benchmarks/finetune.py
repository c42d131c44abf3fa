"""Fine-tune of a full-size LLaVA-1.5-7B: surf and the plain Hugging Face Trainer side by side, each switch turned in turn.

python benchmarks/finetune.py [--gpus 2] [--rows NAME@BATCH ...] [--steps 4] [--seconds S] [--out FOLDER] [--fresh] [--tiny]

Random weights from the model's config class, nothing is downloaded. A sample has three images and 300 text tokens, 2,028 tokens
in all; images are real JPEG files, decoded by the data loader's workers. FLOPs of a sample: surf/training/speed.py; what is
computed again to save memory does not count.

Each row stands in FOLDER (rows.jsonl, table.md) as soon as it is measured, those of most worth first, so that a run that is cut
off still yields a table. One start of the processes measures row after row; if a row fails it says why, and the rest goes on in
new processes. What they say is in FOLDER/log.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import common
import llava

from surf import config, samples
from surf.models import fused
from surf.training import network
from surf.training.arguments import arguments
from surf.training.processes import any_process
from surf.training.speed import PEAKS, cost
from surf.training.trainer import trainer

WARM_UP = 3  # steps before the clock starts; ZeRO-3 records the order of the layers in the second and uses it from the third on
PATIENCE = 180  # seconds without a new row after which the processes hang
PLAIN = "plain Hugging Face Trainer"
OURS = "surf"
SWITCHES: dict[str, dict[str, Any]] = {
    PLAIN: {"gather_layers": False},
    OURS: {},
    "surf, nothing compiled": {"compile": False},
    "surf, logits of all positions": {"loss_chunk": 0},
    "surf, padded rows": {"packing": False},
    "surf, ZeRO-3 matrix by matrix": {"gather_layers": False},
    "surf, one decoder of images": {"workers": 1},
    "surf, LoRA": {"method": "lora", "zero_stage": 2},
    "surf, 2 layers kept": {"keep_layers": 2},
    "surf, 4 layers kept": {"keep_layers": 4},
    "surf, ZeRO-2": {"zero_stage": 2},
}
ROWS = [f"{OURS}@8", f"{PLAIN}@8", f"{OURS}@16"]  # the first seven rows in some four minutes
ROWS += [f"{name}@8" for name in list(SWITCHES)[2:]] + [f"{PLAIN}@16"]  # the last two may be out of memory: a new start
TINY = [f"{OURS}@2", f"{PLAIN}@2", "surf, 2 layers kept@2"]
HEAD = ["", "batch", "samples/s/GPU", "/ plain", "MFU", "of measured peak", "peak GiB", "data wait", "max Δ loss", "set-up s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, help="processes; all GPUs of this machine if left out")
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed")
    names = ", ".join(SWITCHES)
    parser.add_argument("--rows", nargs="+", metavar="NAME@BATCH", help=f"names: {names}; batch: samples a GPU and step")
    parser.add_argument("--seconds", type=float, default=1e6, help="end after so many seconds, whatever is left to measure")
    parser.add_argument("--out", type=Path, help="folder of the results; a new temporary one if left out")
    parser.add_argument("--fresh", action="store_true", help="new processes for every row")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, few steps, three rows: shows that the command works")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.out)
    elif int(os.environ.get("RANK", "0")) == 0:  # started by torchrun: the first process does it all
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Have every row measured; print the table."""
    import torch

    end = time.time() + args.seconds
    gpus = args.gpus or max(torch.cuda.device_count(), 1)
    out = args.out or Path(mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    for name in ("rows.jsonl", "peak.json", "log"):
        (out / name).unlink(missing_ok=True)
    scratch = Path(mkdtemp())
    llava.photographs(scratch / "images")
    rows = args.rows or (TINY if args.tiny else ROWS)
    largest = max(_split(row)[1] for row in rows)
    retried: set[str] = set()
    while time.time() < end and (left := rows[len(read(out)) :]):
        first = len(read(out))
        steps = 2 if args.tiny else args.steps
        plan = {"rows": left[:1] if args.fresh else left, "steps": steps, "samples": (WARM_UP + steps) * largest * gpus}
        (out / "plan.json").write_text(json.dumps({**plan, "tiny": args.tiny, "end": end, "scratch": str(scratch)}))
        why = start(gpus, out, end)
        found = len(read(out))
        if found == len(rows) or not why or time.time() >= end:
            continue
        if found > first and rows[found] not in retried:
            retried.add(rows[found])  # perhaps the memory of the row before was in its way: once more, in new processes
        else:
            write(out, {"row": _split(rows[found])[0], "batch": _split(rows[found])[1], "error": why})
    found_rows = read(out)
    print(f"\n{common.machine()}; {gpus} processes, ZeRO-3 if not said otherwise", end="")
    print(f", {next((row['tokens'] for row in found_rows if 'tokens' in row), 0):,} tokens a sample")
    if reachable := _reachable(out):
        print(f"bfloat16 matrix product of 8192 x 8192 measured at {reachable / 1e12:.0f} TFLOP/s")
    print(f"\n{table(out)}\n\n{losses(out)}")
    for row in rows[len(found_rows) :]:
        print(f"not measured, time was over: {row}")


def start(gpus: int, out: Path, end: float) -> str:
    """Run processes that measure the rows of the plan; returns why they failed, if they did."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), __file__]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with open(out / "log", "a+") as log:
        before, seen, since = log.tell(), len(read(out)), time.time()
        running = subprocess.Popen([*command, "--work", "--out", str(out)], env=environment, stdout=log, stderr=log)
        slow = False
        while running.poll() is None:
            time.sleep(0.5)
            if rows := read(out)[seen:]:
                seen, since = seen + len(rows), time.time()
                show(rows, out)
            if (slow := time.time() - since > PATIENCE) or time.time() > end:
                common.kill(running)
        show(read(out)[seen:], out)
        log.seek(before)
        said = log.read()
    if slow:
        return f"no result in {PATIENCE} s"
    if running.returncode == 0:
        return ""
    if "OutOfMemory" in said:
        return "out of memory"
    lines = [line for line in said.splitlines() if re.search(r"Error\b", line) and "ChildFailed" not in line]
    return re.sub(r"^\[\w+\]:", "", lines[-1]).strip()[:120] if lines else f"ended with code {running.returncode}"


def read(out: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    file = out / "rows.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write(out: Path, row: dict[str, Any]) -> None:
    """Add a row."""
    with open(out / "rows.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    if "error" in row:
        show([row], out)


def show(rows: list[dict[str, Any]], out: Path) -> None:
    """Print new rows, and write the table anew."""
    for row in rows:
        print(common.table([], [cells(row, out)]).splitlines()[-1], flush=True)
    (out / "table.md").write_text(table(out) + "\n")


def table(out: Path) -> str:
    """The rows that are there as Markdown."""
    return common.table(HEAD, [cells(row, out) for row in read(out)])


def losses(out: Path) -> str:
    """The losses of each step, row by row, as Markdown: every row takes the same samples in the same order."""
    rows = [row for row in read(out) if "losses" in row]
    longest = max((len(row["losses"]) for row in rows), default=0)
    head = ["loss of step", *map(str, range(1, longest + 1))]
    return common.table(head, [[f"{row['row']}@{row['batch']}", *(f"{loss:.3f}" for loss in row["losses"])] for row in rows])


def cells(row: dict[str, Any], out: Path) -> list[Any]:
    """One line of the table; a row that failed says why."""
    if "error" in row:
        return [row["row"], row["batch"], row["error"], *[""] * (len(HEAD) - 3)]
    plain = next((one for one in read(out) if "losses" in one and (one["row"], one["batch"]) == (PLAIN, row["batch"])), {})
    reachable, known = _reachable(out), PEAKS.get(row["gpu"])
    achieved = row["flops"] * row["samples_per_second"]
    return [
        row["row"],
        row["batch"],
        row["samples_per_second"],
        row["samples_per_second"] / plain["samples_per_second"] if plain else "",
        f"{achieved / known:.1%}" if known else "",
        f"{achieved / reachable:.1%}" if reachable else "",
        row["peak_gib"],
        f"{row['data_wait']:.1%}" if "data_wait" in row else "",
        max((abs(one - other) for one, other in zip(row["losses"], plain.get("losses", []), strict=False)), default=""),
        row["set_up"],
    ]


def _split(row: str) -> tuple[str, int]:
    name, batch = row.rsplit("@", 1)
    if name not in SWITCHES:
        raise SystemExit(f"--rows: there is no row {name!r}; expected one of {', '.join(SWITCHES)}, then @ and a batch size")
    return name, int(batch)


def _reachable(out: Path) -> float | None:
    file = out / "peak.json"
    return float(json.loads(file.read_text())) if file.exists() else None


# --- in the processes ---------------------------------------------------------------------------------------------------


def work(out: Path) -> None:
    """Measure the rows of `out`/plan.json one after the other, in each process of the group."""
    import torch

    plan = json.loads((out / "plan.json").read_text())
    rank = int(os.environ["RANK"])
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if cuda and not rank and not (out / "peak.json").exists():
        (out / "peak.json").write_text(json.dumps(matmul()))
    processor, _ = llava.processor_and_config(plan["tiny"])
    lvlm = config.Lvlm(dtype="float32" if plan["tiny"] else "bfloat16")
    images = config.Images(roots=[str(Path(plan["scratch"]) / "images")])
    rows = llava.rows(plan["samples"], processor, lvlm, images)
    made = [samples.make_sample(row, processor, lvlm, images) for row in rows]
    for name, batch in map(_split, plan["rows"]):
        print(f"--- {name}@{batch}", flush=True)
        figures = run(name, batch, plan, made, processor, lvlm, images)
        if not rank:
            write(out, {"row": name, "batch": batch, **figures})
        left = free()
        if any_process(left > 1 or time.time() > plan["end"], torch.device("cuda" if cuda else "cpu")):
            print(f"{left:.1f} GiB were not given back: the next row gets new processes", flush=True)
            break
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads can abort an interpreter that shuts down at leisure


def run(name: str, batch: int, plan: dict[str, Any], made: list[Any], processor: Any, lvlm: Any, images: Any) -> dict[str, Any]:
    """Figures of one row."""
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import Trainer

    begin = time.monotonic()
    world, plain, cuda = int(os.environ["WORLD_SIZE"]), name == PLAIN, torch.cuda.is_available()
    chosen = made[: (WARM_UP + plan["steps"]) * batch * world]
    options = {"processes": world, "batch_size": batch, "learning_rate": 1e-5, "save_steps": 10**6, "warmup_ratio": 0.0}
    finetune = config.Finetune(**options, **SWITCHES[name])
    # DeepSpeed's settings must be there before the model is
    settings = arguments(Path(plan["scratch"]) / "run", 0, finetune, lvlm)
    settings.save_strategy = "no"  # the plain Trainer saves at its end: 81 GB
    _, whole = llava.processor_and_config(plan["tiny"])
    # under ZeRO-3 each process makes its share of the weights; else they are made where they shall be
    model = llava.model(whole, network.dtype(settings), f"cuda:{os.environ['LOCAL_RANK']}" if cuda else None)
    packed = False if plain else network.packs(finetune, processor)
    collator = partial(samples.collate, processor=processor, lvlm=lvlm, images=images, packed=packed)
    if plain:

        class Plain(Trainer):
            def _get_train_sampler(self, *_: Any) -> Any:
                return SequentialSampler(chosen)  # the same order, so that losses can be compared

        for key, weight in model.named_parameters():
            weight.requires_grad_("vision_tower" not in key)
        settings.gradient_checkpointing, settings.gradient_checkpointing_kwargs = True, {"use_reentrant": False}
        counted = cost(model)
        running = Plain(model=model, args=settings, train_dataset=chosen, data_collator=collator, processing_class=processor)
    else:
        model, _ = network.prepare(model, finetune, processor)
        counted = cost(model)  # LoRA saves FLOPs; counted in full, its MFU shows what it saves
        running = trainer(model, settings, chosen, collator, processor, [], counted)
    ends: list[float] = []
    running.add_callback(marks(ends))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    running.train()
    seconds = statistics.median(end - begin for begin, end in pairwise(ends[WARM_UP - 1 :]))
    history = [entry for entry in running.state.log_history if "loss" in entry]
    waits = [entry["data_wait"] for entry in history[WARM_UP:] if "data_wait" in entry]
    if running.is_deepspeed_enabled:
        running.model_wrapped.destroy()
    running.accelerator.free_memory()
    fused.disable(model)  # one function is shared by all models of the process: the next row starts without it
    return {
        "samples_per_second": batch / seconds,
        "seconds_per_step": seconds,
        "steps": [round(end - begin, 3) for begin, end in pairwise(ends)],
        "set_up": ends[0] - begin,  # with the first step
        "flops": counted.flops(made[0]),
        "tokens": made[0].length,
        "peak_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else common.peak_mb() / 1024,
        "losses": [entry["loss"] for entry in history],
        "gpu": next((part for part in PEAKS if cuda and part in torch.cuda.get_device_name()), ""),
        **({"data_wait": waits[-1]} if waits else {}),
    }


def free() -> float:
    """Give back the memory of a row: DeepSpeed's hooks and caches keep what it has made. Returns the GiB still in use."""
    import gc

    import torch

    torch.compiler.reset()  # compiled again from the files that inductor keeps
    gc.collect()
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.is_cuda:
            with suppress(RuntimeError):  # memory of somebody else
                thing.untyped_storage().resize_(0)
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() / 2**30


def marks(ends: list[float]) -> Any:
    """A callback that fills `ends` with the times at which steps end."""
    import torch
    from transformers import TrainerCallback

    class Mark(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.monotonic())

    return Mark()


def matmul() -> float:
    """FLOP/s of a large bfloat16 matrix product on this process's GPU: the peak that can be reached."""
    import torch

    one = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * len(one) ** 3 / common.seconds(lambda: one @ one, 50)


if __name__ == "__main__":
    main()
