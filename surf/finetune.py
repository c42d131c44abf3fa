"""Fine-tune the vision-language model on the pairs: Hugging Face Trainer, DeepSpeed ZeRO.

    torchrun --standalone --nproc-per-node N -m surf.finetune --pairs pairs.parquet --out model --seed 0 FLAGS

In: `pairs`. Out: `model/`, a plain Hugging Face folder; `model.json` is written last and says that the rest is whole.
Checkpoints lie in `model/_checkpoints`, and a killed run goes on from the last whole one. The loss is taken on the answer
and its end token only, averaged over the tokens of all processes and accumulated steps.
"""

import hashlib
import json
import logging
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from surf import __version__, checkpoints, cli, store
from surf.config import Finetune, Images, Lvlm
from surf.errors import SurfError
from surf.processing import load_processor, stop_at_end
from surf.samples import Sample, collate, make_samples

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
    log.setLevel(logging.ERROR if checkpoints.rank() else logging.INFO)  # one voice
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    train(args.pairs, args.out, seed=args.seed, finetune=args.finetune, lvlm=args.lvlm, images=args.images)
    _leave()


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
    run = {"fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16], "result": None}
    if checkpoints.restore(out, run):
        return
    processor = load_processor(lvlm)
    samples, dropped = make_samples(store.rows(table), processor, finetune, lvlm, images, where=str(pairs))
    with _signals() as caught:
        arguments = _arguments(out / "_checkpoints", seed, finetune, lvlm)  # joins the group of processes
        checkpoint = _share(None if checkpoints.rank() else checkpoints.last(out / "_checkpoints", run))
        model, trainable = _load(lvlm, finetune, arguments, checkpoint)
        stop_at_end(model, processor)
        collator = partial(collate, processor=processor, lvlm=lvlm, images=images)
        trainer = _trainer(model, arguments, samples, collator, processor, caught)
        log.info("%d samples, %d parameters to train, %d processes", len(samples), trainable, world)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except SurfError as error:  # a worker wraps it into its traceback
            raise SurfError(str(error).strip().rsplit("SurfError: ", 1)[-1]) from None
        if trainer.state.global_step < trainer.state.max_steps:
            log.info("stopped by a signal at step %d; the same command goes on from there", trainer.state.global_step)
            raise SystemExit(128 + (caught[0] if caught else signal.SIGTERM))
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    curve = [{"step": entry["step"], "loss": entry["loss"], "lr": entry["learning_rate"]} for entry in history]
    result = {
        **facts,
        "samples": len(samples),
        "dropped": dropped,
        "steps": trainer.state.global_step,
        "epochs": finetune.epochs,
        "trainable_parameters": trainable,
        "loss": curve[-1]["loss"],
        "loss_curve": curve,
    }
    checkpoints.publish(trainer, out, {**run, "result": result})


# --- the trainer ------------------------------------------------------------------------------------------------------


def _arguments(folder: Path, seed: int, finetune: Finetune, lvlm: Lvlm) -> Any:
    import torch
    from transformers import TrainingArguments

    cuda = torch.cuda.is_available()
    bf16 = lvlm.dtype == "bfloat16"
    zero: dict[str, Any] | None = None
    if finetune.zero_stage:
        if not cuda:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        # Shared-memory collectives for CPUs are compiled at first use, which takes minutes and a compiler; gloo will do.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        zero = {  # no "optimizer": DeepSpeed's own are compiled as well, the Trainer's AdamW is torch's
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": bf16},
            "zero_optimization": {
                "stage": finetune.zero_stage,
                "overlap_comm": cuda,
                "contiguous_gradients": True,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
        }
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=finetune.batch_size,
        gradient_accumulation_steps=finetune.accumulation,
        num_train_epochs=finetune.epochs,
        learning_rate=finetune.learning_rate,
        weight_decay=finetune.weight_decay,
        optim="adamw_torch",
        lr_scheduler_type="cosine",
        warmup_steps=min(finetune.warmup_ratio, 1 - 1e-9),  # below 1 it is a share of the steps
        bf16=bf16,
        gradient_checkpointing=finetune.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        deepspeed=zero,
        ddp_find_unused_parameters=False,
        use_cpu=not cuda,
        seed=seed % 2**32,
        dataloader_num_workers=_workers(),
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        save_steps=finetune.save_steps,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )


def _workers() -> int:
    """Processes that decode images, for each training process; without a GPU they are not worth their start."""
    import torch

    return 4 if torch.cuda.is_available() else 0


def _load(lvlm: Lvlm, finetune: Finetune, arguments: Any, checkpoint: str | None) -> tuple[Any, int]:
    """The model, frozen but for `finetune.train`, and the number of parameters that are trained."""
    import torch
    from transformers import AutoModelForImageTextToText, set_seed
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    set_seed(arguments.seed)
    # DeepSpeed keeps float32 master weights itself; without it the weights are the masters, and autocast does the rest.
    dtype = torch.bfloat16 if arguments.bf16 and arguments.deepspeed else torch.float32
    source = checkpoint if checkpoint and not arguments.deepspeed else lvlm.model
    try:
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        what = f"cannot be loaded ({str(error).strip().splitlines()[0]})"
        raise SurfError(what, where=f"lvlm.model {lvlm.model}", expected="a model with safetensors weights") from None
    trainable = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in finetune.train))
        if parameter.requires_grad:
            trainable += getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty shell
    if not trainable:
        top = sorted({".".join(name.split(".")[:2]) for name, _ in model.named_parameters()})
        what = f"no parameter of the model has any of {finetune.train} in its name"
        raise SurfError(what, where="finetune.train", expected=f"parts of names such as {', '.join(top)}")
    return model, trainable


def _trainer(model: Any, arguments: Any, samples: list[Sample], collator: Any, processor: Any, caught: list[int]) -> Any:
    from transformers import PrinterCallback, Trainer, TrainerCallback

    group = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    start = {"time": 0.0, "step": 0}

    class Watcher(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            start.update(time=time.monotonic(), step=state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            logs = more["logs"]
            if "loss" not in logs:
                return
            if not math.isfinite(logs["loss"]):
                what = f"the loss is {logs['loss']} at step {state.global_step}"
                raise SurfError(what, expected="a number", next="lower finetune.learning_rate, or set lvlm.dtype: float32")
            pace = (state.global_step - start["step"]) / (time.monotonic() - start["time"])
            left = timedelta(seconds=round((state.max_steps - state.global_step) / pace))
            form = "step %d/%d  loss %.4f  lr %.2e  %.2f samples/s  %s left"
            log.info(form, state.global_step, state.max_steps, logs["loss"], logs["learning_rate"], pace * group, left)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= state.max_steps:
                control.should_save = False  # the model itself comes next; a checkpoint here would be resumed beyond the end
            elif _any_process(bool(caught), args.device):
                control.should_save = control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _any_process(False, args.device)  # every process has written its part
            if not checkpoints.rank():
                (Path(args.output_dir) / f"checkpoint-{state.global_step}" / checkpoints.WHOLE).touch()

    trainer: Any = Trainer(
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=collator,
        processing_class=processor,
        callbacks=[Watcher()],
    )
    trainer.remove_callback(PrinterCallback)
    # The Trainer would look for the model's own parameter names in the checkpoint, where they have their published names,
    # and go on with untrained weights: `_load` has read them. (DeepSpeed's checkpoints are not read by this method.)
    trainer._load_from_checkpoint = lambda *_: None
    return trainer


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Numbers of the signals that arrive; they end the training at the next step."""
    caught: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- processes --------------------------------------------------------------------------------------------------------


def _leave() -> None:
    """End this process at once, with all the others: gloo's threads can abort an interpreter that shuts down at leisure."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


def _any_process(flag: bool, device: Any) -> bool:
    """True in all processes if it is in one: they must leave the training at the same step."""
    import torch

    if not torch.distributed.is_initialized():
        return flag
    total = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(total)
    return bool(total.item())


def _share(value: str | None) -> str | None:
    """The first process's value, in all processes."""
    import torch

    values = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(values)
    return values[0]


if __name__ == "__main__":
    cli.run(main)
