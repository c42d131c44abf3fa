"""Sampling that no batch, order or device changes: one number a row and step picks from the row's own distribution."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def uniforms(seeds: Sequence[int] | np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """float64 [seeds, steps] in [0, 1): SplitMix64 (Steele, Lea and Flood 2014), of the row's seed and the step."""
    with np.errstate(over="ignore"):
        state = np.array(seeds, np.uint64)[:, None] + (np.array(steps, np.uint64)[None] + np.uint64(1)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) / 2.0**53


def pick(logits: Any, temperature: float, uniform: Any) -> Any:
    """The next token of each row: the most probable one at temperature 0, else the one at quantile `uniform` of the softmax.

    Args:
        logits: [..., vocabulary].
        uniform: float64 [...], from `uniforms`; not looked at if the temperature is 0.
    """
    if not temperature:
        return logits.argmax(-1)
    # float64, so that the quantile of a token does not hang on the order in which a device adds
    steps = (logits.double() / temperature).softmax(-1).cumsum(-1)
    return (steps <= (uniform * steps[..., -1]).unsqueeze(-1)).sum(-1).clamp_(max=logits.shape[-1] - 1)


class Pick:
    """`pick` for `generate`: the scores of the picked token are 0, all others -inf."""

    def __init__(self, seeds: Sequence[int] | np.ndarray, temperature: float) -> None:
        self.seeds, self.temperature, self.step = seeds, temperature, 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        uniform = torch.from_numpy(uniforms(self.seeds, [self.step])[:, 0]).to(scores.device)
        self.step += 1
        chosen = pick(scores, self.temperature, uniform)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen[:, None], 0.0)
