"""Do two engines answer alike? A gate before a long run of the faster one.

The gate opens with the first prompts that come: `lvlm.parity_prompts` of them are answered greedily by the transformers engine,
which is then thrown away, and by the new engine. Every job pays for that: it loads the weights twice, one engine after the
other. Near ties may fall to either side by the noise of 16-bit arithmetic, so a share of different answers is let through.
"""

import gc
import logging
import sys
import threading
from collections.abc import Callable, Sequence

from surf import config
from surf.errors import SurfError
from surf.models import Request, Responder
from surf.shards import stable_hash

log = logging.getLogger("surf")

TOKENS = 16  # compared of an answer: behind a first difference, everything differs


class Gate:
    """A `Responder` that loads an engine with the first prompts, and only if it answers them as another one does.

    Args:
        reference: loads the engine to compare with; its memory is given back before the other one is loaded.
        engine: loads the engine that answers.
        options: the config's section; `parity_prompts` and `parity_limit` are used.
    """

    def __init__(self, reference: Callable[[], Responder], engine: Callable[[], Responder], options: config.Lvlm) -> None:
        self.reference, self.engine, self.options = reference, engine, options
        self.lock = threading.Lock()
        self.opened: Responder | None = None

    def respond(self, requests: Sequence[Request], *, max_new_tokens: int, temperature: float = 0.0) -> list[str]:
        """See `surf.models.Responder`.

        Raises:
            SurfError: the engines answer too many prompts differently.
        """
        responder = self._open(requests)
        return responder.respond(requests, max_new_tokens=max_new_tokens, temperature=temperature) if responder else []

    def loglik(self, requests: Sequence[Request], golds: Sequence[str]) -> list[float]:
        """See `surf.models.Responder`, and `respond`."""
        responder = self._open(requests)
        return responder.loglik(requests, golds) if responder else []

    def _open(self, requests: Sequence[Request]) -> Responder | None:
        with self.lock:
            if self.opened is None and requests:
                # by hash: the first rows of a part are often about one image
                some = sorted(requests, key=lambda one: stable_hash(one.prompt))[: self.options.parity_prompts]
                expected = self.reference().respond(some, max_new_tokens=TOKENS)
                _give_back()
                opened = self.engine()
                compare(expected, opened.respond(some, max_new_tokens=TOKENS), self.options)
                self.opened = opened
            return self.opened


def compare(expected: Sequence[str], found: Sequence[str], options: config.Lvlm) -> None:
    """Let greedy answers pass that are those of the transformers engine, but for a share of `lvlm.parity_limit`.

    Raises:
        SurfError: more of them differ.
    """
    different = [(old, new) for old, new in zip(expected, found, strict=True) if old != new]
    # of very few prompts one may differ, too: what is left of a part after a kill can be a single row
    allowed = max(int(options.parity_limit * len(expected) + 1e-9), int(options.parity_limit > 0))
    if len(different) > allowed:
        old, new = different[0]
        raise SurfError(
            f"{len(different)} of {len(expected)} prompts are answered differently than by transformers, the first with {new!r}"
            f" instead of {old!r}",
            where=f"lvlm.engine = {options.engine!r}",
            expected=f"a share of at most {options.parity_limit:g} (lvlm.parity_limit)",
            next="set lvlm.engine: transformers in config.yaml and type the same command again; or raise lvlm.parity_limit if"
            " either answer will do",
        )
    log.info("parity: %d of %d prompts are answered as by transformers", len(expected) - len(different), len(expected))


def _give_back() -> None:
    """Free the memory of what nobody holds any more."""
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()
