"""A model that is asked nothing twice."""

from collections.abc import Sequence
from typing import Any

from surf.models import Request, Responder
from surf.shards import stable_hash


class Once:
    """A `Responder` that asks no prompt twice: splits share questions, methods share prompts."""

    def __init__(self, responder: Responder) -> None:
        self.responder = responder
        self.known: dict[tuple[Any, ...], Any] = {}

    def respond(self, requests: Sequence[Request], *, max_new_tokens: int, temperature: float = 0.0) -> list[str]:
        """See `surf.models.Responder`. Greedy only: a drawn answer belongs to its row."""
        keys = [(max_new_tokens, stable_hash(request.prompt)) for request in requests]
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in self.known}
        if new:
            texts = self.responder.respond(list(new.values()), max_new_tokens=max_new_tokens, temperature=0.0)
            self.known.update(zip(new, texts, strict=True))
        return [self.known[key] for key in keys]

    def loglik(self, requests: Sequence[Request], golds: Sequence[str]) -> list[float]:
        """See `surf.models.Responder`."""
        keys = [("loglik", stable_hash(request.prompt), gold) for request, gold in zip(requests, golds, strict=True)]
        new = {key: one for key, one in zip(keys, zip(requests, golds, strict=True), strict=True) if key not in self.known}
        if new:
            values = self.responder.loglik([request for request, _ in new.values()], [gold for _, gold in new.values()])
            self.known.update(zip(new, values, strict=True))
        return [self.known[key] for key in keys]
