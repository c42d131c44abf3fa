"""The settings of the Trainer and of DeepSpeed."""

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from surf.config import Finetune, Lvlm
from surf.errors import SurfError


def arguments(folder: Path, seed: int, finetune: Finetune, lvlm: Lvlm) -> Any:
    """`TrainingArguments` for a run whose checkpoints lie in `folder`; making them joins the group of processes."""
    import torch
    from transformers import TrainingArguments

    for name in finetune.report_to:
        if not find_spec(name):
            raise SurfError(f"{name} is not installed", where="finetune.report_to", next=f"pip install {name}")
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    cuda = torch.cuda.is_available()
    workers = finetune.workers if finetune.workers is not None else 4 if cuda else 0  # without a GPU not worth their start
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=finetune.batch_size,
        gradient_accumulation_steps=finetune.accumulation,
        num_train_epochs=1,  # the samples stand in the order of all epochs, see `order`
        learning_rate=finetune.learning_rate,
        weight_decay=finetune.weight_decay,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        lr_scheduler_type="cosine",
        warmup_steps=min(finetune.warmup_ratio, 1 - 1e-9),  # below 1 it is a share of the steps
        bf16=lvlm.dtype == "bfloat16",
        gradient_checkpointing=False,  # `network.load` turns it on, layer by layer
        deepspeed=_deepspeed(finetune, lvlm, cuda) if finetune.zero_stage else None,
        ddp_find_unused_parameters=False,
        use_cpu=not cuda,
        seed=seed % 2**32,
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=4 if workers else None,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        save_steps=finetune.save_steps,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(finetune.report_to) or "none",
        disable_tqdm=True,
    )


def _deepspeed(finetune: Finetune, lvlm: Lvlm, cuda: bool) -> dict[str, Any]:
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops
    import torch

    # Shared-memory collectives for CPUs are compiled at first use, which takes minutes and a compiler; gloo will do.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    zero: dict[str, Any] = {
        "stage": finetune.zero_stage,
        "overlap_comm": cuda,
        "contiguous_gradients": True,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    if finetune.gather_layers:
        # A layer of a 7B model has 2e8 weights and is gathered at once, in a tenth of the time that it computes: the next one
        # is gathered meanwhile; DeepSpeed's 5e7 would stop amid a layer, and more would hold memory for nothing.
        # Small weights come with their layer; DeepSpeed would keep them, and gather them one by one after each step.
        zero |= {"stage3_prefetch_bucket_size": int(2e8), "stage3_param_persistence_threshold": 0}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": lvlm.dtype == "bfloat16"},
        "zero_optimization": zero,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice a step
    }
    torch.serialization.set_crc32_options(False)  # halves the time of a checkpoint; its files' sizes are checked
    if finetune.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
        if finetune.offload == "all" and finetune.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
        # DeepSpeed wants its own optimizer here. Its CPU kernel is compiled at first use; without a GPU torch's will do.
        values = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
        settings["optimizer"] = {"type": "AdamW", "params": {**values, "torch_adam": not cuda}}
    return settings
