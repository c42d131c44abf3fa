"""Which sample is trained when: one list for the whole run, made from the seed before the first step.

A run that goes on skips what it has had, whatever the number of processes; nothing else keeps the order.
"""

import math
from collections.abc import Sequence

import numpy as np

_WINDOW = 50  # steps among which samples of similar length are brought together; more groups better and mixes less


def schedule(lengths: Sequence[int], epochs: float, seed: int, *, group: int, by_length: bool) -> list[int]:
    """Numbers of the samples in the order of training, each epoch shuffled anew.

    Args:
        lengths: of all samples (tokens).
        epochs: the last one may be a part of one.
        group: samples of one step, over all processes and accumulated batches.
        by_length: samples of one step have similar lengths; an epoch's longest come first: a lack of memory shows at once.

    Returns:
        ceil(epochs * samples) numbers; one step takes the next `group` of them.
    """
    total = math.ceil(epochs * len(lengths) - 1e-9)
    order: list[int] = []
    for epoch in range(math.ceil(epochs)):
        shuffled = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(lengths)).tolist()
        order += _grouped(shuffled, lengths, seed, epoch, group) if by_length else shuffled
    return order[:total]


def _grouped(shuffled: list[int], lengths: Sequence[int], seed: int, epoch: int, group: int) -> list[int]:
    steps = []
    for start in range(0, len(shuffled), group * _WINDOW):
        window = sorted(shuffled[start : start + group * _WINDOW], key=lambda number: -lengths[number])
        steps += [window[first : first + group] for first in range(0, len(window), group)]
    rest = [steps.pop()] if len(steps[-1]) < group else []  # an incomplete step stays the last
    mixed = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=1)).permutation(len(steps)).tolist()
    longest = max(range(len(steps)), key=lambda step: lengths[steps[step][0]], default=0)
    mixed.sort(key=lambda step: step != longest)
    return [number for step in [*(steps[step] for step in mixed), *rest] for number in step]
