"""Several processes, one a GPU, train one model: each on scenes of its own, with the mean of all gradients.

    torchrun --standalone --nproc-per-node 2 -m surf.demo.train …

Started without torchrun, a process is alone, and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any


def join(device: str) -> tuple[int, int, str]:
    """Meet the other processes. Returns this one's number, how many there are, and its device."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if world > 1:
        import torch

        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return rank, world, device


def first() -> bool:
    """Is this the process that speaks and saves?"""
    return os.environ.get("RANK", "0") == "0"


def average(parameters: Sequence[Any]) -> None:
    """Put the mean over all processes in the place of every gradient."""
    import torch

    if not torch.distributed.is_initialized():
        return
    gradients = [one.grad for one in parameters if one.grad is not None]
    flat = torch.cat([one.flatten() for one in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for own, mean in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
        own.copy_(mean.view_as(own))


def leave() -> None:
    """Wait for the others, who may still be writing."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
