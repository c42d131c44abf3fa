"""The processes that train together: what they agree on, how they are stopped, how they leave."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signals() -> Iterator[list[int]]:
    """Numbers of the signals that arrive; they end the training at the next step."""
    caught: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_process(flag: bool, device: Any) -> bool:
    """True in all processes if it is in one: they must leave the training at the same step."""
    import torch

    if not torch.distributed.is_initialized():
        return flag
    total = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(total)
    return bool(total.item())


def share(value: str | None) -> str | None:
    """The first process's value, in all processes."""
    import torch

    values = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(values)
    return values[0]


def leave() -> None:
    """End this process at once, with all the others: gloo's threads can abort an interpreter that shuts down at leisure."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)
