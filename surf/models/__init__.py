"""What the stages need of a model. Loading one is the business of `clip`, `lvlm` and `vllm`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from surf import config
from surf.images import Images
from surf.prompts import Prompt, Reference, from_options
from surf.telemetry import Meter


@dataclass(frozen=True)
class Request:
    """One prompt to answer.

    `seed` (64 bits) drives the row's own random numbers when the temperature is above 0; derive it with
    `surf.shards.stable_hash(seed, round_id, rank)` so that no batch, shard or device changes it. `guess` is a guess at the
    tokens that the answer takes, 0 for none: it orders the work and changes no answer. `shorter` makes the same prompt with
    captions of at most so many characters, for a model whose context is too short.
    """

    prompt: Prompt
    seed: int = 0
    guess: int = 0
    shorter: Callable[[int], Prompt] | None = field(default=None, compare=False, repr=False)


def request(
    question: str,
    image: str,
    references: Sequence[Reference],
    lvlm: config.Lvlm,
    *,
    show: str = "both",
    seed: int = 0,
    guess: int = 0,
) -> Request:
    """One prompt with the settings of the config's section, whose captions can be cut to fit into the model's context."""

    def shorter(chars: int) -> Prompt:
        return from_options(question, image, references, lvlm.model_copy(update={"caption_chars": chars}), show)

    return Request(from_options(question, image, references, lvlm, show), seed, guess, shorter if references else None)


class Encoder(Protocol):
    """Images to vectors."""

    dim: int
    meter: Meter  # busy times of reading, decoding and the model

    def stream(self, names: Sequence[str]) -> Iterator[tuple[list[int], np.ndarray, dict[int, str]]]:
        """Batches of (numbers into `names`, float32 [len(numbers), dim] of L2-normalised rows, errors by number), in an
        order that suits reading. The row of an unreadable image is all zeros."""
        ...

    def encode(self, names: Sequence[str]) -> tuple[np.ndarray, dict[str, str]]:
        """All of `stream` in the order of `names`: (float32 [len(names), dim], errors by name)."""
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


def load_responder(options: config.Lvlm, images: Images, model: str | None = None) -> Responder:
    """The model of the config's `lvlm` section (or the one in folder `model`) in the engine that `lvlm.engine` names.

    Raises:
        SurfError: the model cannot be loaded, or the engine is not installed.
    """
    from surf.models import lvlm, vllm

    if options.engine == "transformers":
        return lvlm.load(options, images, model)
    return vllm.checked(options, images, model)
