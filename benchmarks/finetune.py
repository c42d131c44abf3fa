"""Fine-tune of a full-size LLaVA-1.5-7B: surf and the plain Hugging Face Trainer side by side, each switch turned off in turn.

python benchmarks/finetune.py [--gpus 2] [--batch 8 16] [--steps 8] [--rows NAME ...] [--tiny]

Random weights from the model's config class, nothing is downloaded. A sample has three images and 300 text tokens, 2,028 tokens
in all; images are real JPEG files, decoded by the data loader's workers. Every row is a torchrun of its own, so that no row
finds the memory of another. FLOPs of a sample: surf/training/speed.py; what is computed again to save memory does not count.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common
import llava

from surf import config, samples
from surf.training import network
from surf.training.arguments import arguments
from surf.training.speed import PEAKS, cost, peak
from surf.training.trainer import trainer

WARM_UP = 3  # steps before the clock starts
PLAIN = "plain Hugging Face Trainer"
OURS = "surf"
SWITCHES: dict[str, dict[str, Any]] = {
    OURS: {},
    "surf, logits of all positions": {"loss_chunk": 0},
    "surf, padded rows": {"packing": False},
    "surf, ZeRO-3 matrix by matrix": {"gather_layers": False},
    "surf, compiled layers": {"compile": True},
    "surf, 4 layers kept": {"keep_layers": 4},
    "surf, 8 layers kept": {"keep_layers": 8},
    "surf, ZeRO-2": {"zero_stage": 2},
    "surf, LoRA": {"method": "lora", "zero_stage": 2},
    "surf, one decoder of images": {"workers": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, help="processes; all GPUs of this machine if left out")
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="samples a GPU and step")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    parser.add_argument("--rows", nargs="+", default=None, metavar="NAME", help=f"some of: {PLAIN!r}, {', '.join(SWITCHES)}")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, few steps, three rows: shows that the command works")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        run(args.row, args.batch[0], args.steps, args.tiny, args.out)
    elif int(os.environ.get("RANK", "0")) == 0:  # started by torchrun: the first process does it all
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Run every row, print the table."""
    import torch

    gpus = args.gpus or max(torch.cuda.device_count(), 1)
    steps = 2 if args.tiny else args.steps
    names = args.rows or [PLAIN, *SWITCHES]
    if args.tiny and not args.rows:
        names = [PLAIN, OURS, "surf, 4 layers kept"]
    found: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        llava.photographs(Path(folder) / "images")
        for batch in args.batch:
            for name in names:
                found.append({"row": name, "batch": batch, **start(name, batch, steps, args.tiny, gpus, Path(folder))})
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    reachable = matmul()
    plain = {row["batch"]: row for row in found if row["row"] == PLAIN}
    known = torch.cuda.is_available() and peak()
    print(f"{common.machine()}; {gpus} processes, {found[0].get('tokens', 0):,} tokens a sample")
    if reachable:
        print(f"bfloat16 matrix product of 8192 x 8192 measured at {reachable / 1e12:.0f} TFLOP/s", end="")
        print(f", data sheet {known / 1e12:.0f}" if known else "")
    head = ["", "batch", "samples/s/GPU", "/ plain", "MFU", "of measured peak", "peak GiB", "data wait", "max Δ loss"]
    print("\n" + common.table(head, [cells(row, plain.get(row["batch"], {}), reachable) for row in found]))


def cells(row: dict[str, Any], plain: dict[str, Any], reachable: float | None) -> list[Any]:
    """One line of the table; a row that failed says why."""
    if "error" in row:
        return [row["row"], row["batch"], row["error"], *[""] * 6]
    achieved = row["flops"] * row["samples_per_second"]
    known = PEAKS.get(row["gpu"])
    both = list(zip(row["losses"], plain.get("losses", []), strict=False))
    return [
        row["row"],
        row["batch"],
        row["samples_per_second"],
        row["samples_per_second"] / plain["samples_per_second"] if "samples_per_second" in plain else "",
        f"{achieved / known:.1%}" if known else "",
        f"{achieved / reachable:.1%}" if reachable else "",
        row["peak_gib"],
        f"{row['data_wait']:.1%}" if "data_wait" in row else "",
        max((abs(one - other) for one, other in both), default=""),
    ]


def start(name: str, batch: int, steps: int, tiny: bool, gpus: int, folder: Path) -> dict[str, Any]:
    """Run one row in processes of its own; {"error": …} if it fails, for lack of memory for instance."""
    out = folder / "row.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), __file__]
    command += ["--row", name, "--batch", str(batch), "--steps", str(steps), "--out", str(out), *(["--tiny"] if tiny else [])]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if out.exists():
        return dict(json.loads(out.read_text()))
    lines = [line for line in done.stderr.splitlines() if "Error" in line and "ChildFailed" not in line] or ["failed"]
    print(done.stderr[-3000:], file=sys.stderr)
    return {"error": "out of memory" if "OutOfMemory" in done.stderr else lines[0].strip()[:80]}


def run(name: str, batch: int, steps: int, tiny: bool, out: Path) -> None:
    """One row, in each of its processes."""
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import Trainer

    class Plain(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(made)  # the same order, so that losses can be compared

    world = int(os.environ["WORLD_SIZE"])
    plain = name == PLAIN
    lvlm = config.Lvlm(dtype="float32" if tiny else "bfloat16")
    options = {"processes": world, "batch_size": batch, "learning_rate": 1e-5, "save_steps": 10**6, "warmup_ratio": 0.0}
    finetune = config.Finetune(**options, **({"gather_layers": False} if plain else SWITCHES[name]))
    processor, whole = llava.processor_and_config(tiny)
    images = config.Images(roots=[str(out.parent / "images")])
    total = (WARM_UP + steps) * batch * world
    rows = llava.rows(total, processor, lvlm, images)
    made = [samples.make_sample(row, processor, lvlm, images) for row in rows]
    settings = arguments(out.parent / "run", 0, finetune, lvlm)  # DeepSpeed's settings must be there before the model is
    cuda = torch.cuda.is_available()
    # under ZeRO-3 each process makes its share of the weights; else they are made where they shall be
    device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else None
    model = llava.model(whole, network.dtype(settings), device)
    packed = False if plain else network.packs(finetune, processor)
    collator = partial(samples.collate, processor=processor, lvlm=lvlm, images=images, packed=packed)
    if plain:
        for key, weight in model.named_parameters():
            weight.requires_grad_("vision_tower" not in key)
        settings.gradient_checkpointing = True
        settings.gradient_checkpointing_kwargs = {"use_reentrant": False}
        counted = cost(model)
        running = Plain(model=model, args=settings, train_dataset=made, data_collator=collator, processing_class=processor)
    else:
        model, _ = network.prepare(model, finetune, processor)
        counted = cost(model)  # LoRA saves FLOPs; counted in full, its MFU shows what it saves
        running = trainer(model, settings, made, collator, processor, [], counted)
    marks = _Marks()
    running.add_callback(marks.callback())
    running.train()
    if int(os.environ["RANK"]) == 0:
        seconds = statistics.median(end - begin for begin, end in pairwise(marks.ends[WARM_UP - 1 :]))
        history = [entry for entry in running.state.log_history if "loss" in entry]
        figures = {
            "samples_per_second": batch / seconds,
            "seconds_per_step": seconds,
            "flops": counted.flops(made[0]),
            "tokens": made[0].length,
            "peak_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else common.peak_mb() / 1024,
            "losses": [entry["loss"] for entry in history],
            "gpu": next((part for part in PEAKS if cuda and part in torch.cuda.get_device_name()), ""),
        }
        waits = [entry["data_wait"] for entry in history[WARM_UP:] if "data_wait" in entry]
        out.write_text(json.dumps({**figures, **({"data_wait": waits[-1]} if waits else {})}))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads can abort an interpreter that shuts down at leisure


class _Marks:
    """The times at which steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def callback(self) -> Any:
        import torch
        from transformers import TrainerCallback

        ends = self.ends

        class Mark(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                ends.append(time.monotonic())

        return Mark()


def matmul() -> float | None:
    """FLOP/s of a large bfloat16 matrix product on the first GPU: the peak that can be reached."""
    import torch

    if not torch.cuda.is_available():
        return None
    size, times = 8192, 50
    one = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    for _ in range(5):
        one @ one
    torch.cuda.synchronize()
    begin = time.monotonic()
    for _ in range(times):
        one @ one
    torch.cuda.synchronize()
    return 2 * size**3 * times / (time.monotonic() - begin)


if __name__ == "__main__":
    main()
