"""What the stages need of a model. Loading one is the business of `clip` and `lvlm`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from surf.prompts import Prompt


@dataclass(frozen=True)
class Request:
    """One prompt to answer.

    `seed` (64 bits) drives the row's own random numbers when the temperature is above 0; derive it with
    `surf.shards.stable_hash(seed, round_id, rank)` so that no batch, shard or device changes it.
    """

    prompt: Prompt
    seed: int = 0


class Encoder(Protocol):
    """Images to vectors."""

    dim: int

    def encode(self, names: Sequence[str]) -> tuple[np.ndarray, dict[str, str]]:
        """(float32 [len(names), dim], L2-normalised rows; errors by name). The row of an unreadable image is all zeros."""
        ...


class Responder(Protocol):
    """Prompts to answers. Two threads may ask at the same time, see `surf.workers.lanes`."""

    def respond(self, requests: Sequence[Request], *, max_new_tokens: int, temperature: float = 0.0) -> list[str]:
        """One answer text for each request, in the order of the requests, stripped of blanks and special tokens.

        Raises ImageError if an image of a prompt cannot be opened: callers sort those rows out first.
        """
        ...

    def loglik(self, requests: Sequence[Request], golds: Sequence[str]) -> list[float]:
        """Mean log-probability (nats a token, end token included) of each gold answer after its prompt."""
        ...
