"""Fine-tune the vision-language model on the pairs: Hugging Face Trainer, DeepSpeed ZeRO.

    torchrun --standalone --nproc-per-node N -m surf.finetune --pairs pairs.parquet --out model --seed 0 FLAGS

In: `pairs`. Out: `model/`, a plain Hugging Face folder; `model.json` is written last and says that the rest is whole.
Checkpoints lie in `model/_checkpoints`, and a killed run goes on from the last whole one. The loss is taken on the answer
and its end token only, averaged over the tokens of all processes and accumulated steps.
"""

import hashlib
import json
import logging
import os
import signal
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from surf import __version__, checkpoints, cli, prompts, store
from surf.config import Finetune, Images, Lvlm
from surf.errors import SurfError
from surf.models import fused
from surf.processing import load_processor
from surf.samples import collate, make_samples
from surf.training import card, network, packing
from surf.training.arguments import arguments
from surf.training.order import schedule
from surf.training.processes import leave, share, signals
from surf.training.speed import cost
from surf.training.trainer import trainer

log = logging.getLogger("surf")


def main() -> None:
    """Command line."""
    args = cli.parse(
        None,
        prog="finetune",
        about="Fine-tune the vision-language model on the pairs.",
        sections=("finetune", "lvlm", "images"),
        paths=("pairs", "out"),
        extras={"seed": {"type": int, "required": True}},
    )
    if "RANK" not in os.environ:  # not started by torchrun: be the one process of a group of one
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # 0: any free port
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # sizes vary from step to step: fewer gaps
    log.setLevel(logging.ERROR if checkpoints.rank() else logging.INFO)  # one voice
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    with checkpoints.alone(args.out):
        train(args.pairs, args.out, seed=args.seed, finetune=args.finetune, lvlm=args.lvlm, images=args.images)
        leave()


def train(pairs: Path, out: Path, *, seed: int, finetune: Finetune, lvlm: Lvlm, images: Images) -> None:
    """Train on `pairs` and write the model folder `out`. Every process of the group calls this.

    Raises:
        SurfError: no usable sample, an unreadable image, settings that fit neither each other nor the model.
        SystemExit: 128 + the signal's number, after SIGTERM or SIGUSR1; a checkpoint has been saved.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != finetune.processes * finetune.nodes:
        expected = f"finetune.processes * finetune.nodes = {finetune.processes} * {finetune.nodes}"
        command = f"torchrun --nnodes {finetune.nodes} --nproc-per-node {finetune.processes} -m surf.finetune ..."
        raise SurfError(f"runs as {world} processes", expected=expected, next=command)
    table = store.read_table(pairs, "pairs")
    facts = {
        "package": __version__,
        "version": Finetune.version,
        "base_model": lvlm.model,
        "seed": seed,
        "flags": cli.flags(finetune=finetune, lvlm=lvlm, images=images),  # no knobs: they change no weight
        "pairs": store.digest(table),
    }
    text = json.dumps([facts, checkpoints.weights_of(lvlm.model)], sort_keys=True)
    run = {"fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16], "flags": facts["flags"], "result": None}
    if checkpoints.restore(out, run):
        return
    processor = load_processor(lvlm)
    samples, dropped = make_samples(store.rows(table), processor, finetune, lvlm, images, where=str(pairs))
    group = finetune.batch_size * finetune.accumulation * world
    lengths = [sample.length for sample in samples]
    order = schedule(lengths, finetune.epochs, seed, group=group, by_length=finetune.group_by_length)
    with signals() as caught:
        settings = arguments(out / "_checkpoints", seed, finetune, lvlm)  # joins the group of processes
        checkpoint = share(None if checkpoints.rank() else checkpoints.last(out / "_checkpoints", run))
        model, trainable = network.load(lvlm, finetune, processor, settings, checkpoint)
        packed = network.packs(finetune, processor)
        collator = partial(collate, processor=processor, lvlm=lvlm, images=images, packed=packed)
        ordered = [samples[number] for number in order]
        running = trainer(model, settings, ordered, collator, processor, caught, cost(model, finetune.method == "full"))
        log.info("%d samples, %d parameters to train, %d processes", len(samples), trainable, world)
        try:
            running.train(resume_from_checkpoint=checkpoint)
        except SurfError as error:  # a worker wraps it into its traceback
            raise SurfError(str(error).strip().rsplit("SurfError: ", 1)[-1]) from None
        if running.state.global_step < running.state.max_steps:
            log.info("stopped by a signal at step %d; the same command goes on from there", running.state.global_step)
            raise SystemExit(128 + (caught[0] if caught else signal.SIGTERM))
    history = [entry for entry in running.state.log_history if "loss" in entry]
    curve = [{"step": entry["step"], "loss": entry["loss"], "lr": entry["learning_rate"]} for entry in history]
    result = {
        **facts,
        "samples": len(samples),
        "dropped": dropped,
        "steps": running.state.global_step,
        "epochs": finetune.epochs,
        "trainable_parameters": trainable,
        "loss": curve[-1]["loss"],
        "loss_curve": curve,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "deepspeed")},
    }
    save = partial(_save, running, finetune, lvlm, result)
    checkpoints.publish(save, out, {**run, "result": result})


def _save(running: Any, finetune: Finetune, lvlm: Lvlm, result: dict[str, Any], folder: Path) -> None:
    """Write the model into `folder`; every process takes part: ZeRO-3 gathers the weights."""
    import torch

    whole = finetune.method == "full"
    if whole and running.args.bf16 and not running.is_deepspeed_enabled:
        running.model.to(torch.bfloat16)
    packing.disable(running.model)  # its name would be saved with the model
    fused.disable(running.model)
    running.save_model(str(folder))
    if checkpoints.rank():
        return
    (folder / "training_args.bin").unlink(missing_ok=True)
    if not whole and finetune.lora.merge:
        network.merged(lvlm, folder).save_pretrained(folder)
        for path in folder.glob("adapter_*"):
            path.unlink()
    shown = [prompts.Reference("first", "caption of the first reference"), prompts.Reference("second", "of the second")]
    prompt = prompts.from_options("the question", "asked", shown, lvlm)
    card.write(folder, result, method=finetune.method, layout=lvlm.layout, prompt=prompt.text)


if __name__ == "__main__":
    cli.run(main)
