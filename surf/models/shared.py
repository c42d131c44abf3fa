"""The fast way to answers: shared prefixes, cached image features, our own decoding. For models that are known to allow it.

The rule is short. A model is taken if its `model_type` stands in `TYPES`, nothing in it contradicts (see `why_not`), and on a
made-up prompt it gives the same logits as the model's own forward pass. All others answer by `generate`.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from surf import config, processing, prompts
from surf.models import fused
from surf.models.decode import STEPS, Steps, generate, places
from surf.models.features import Ahead, Features, pool
from surf.models.prefill import Layout, Prefill
from surf.models.prefix import Group, group, split

log = logging.getLogger("surf")

# An image is a run of one token, always equally many; positions count up by one; attention is causal, also within images.
TYPES = ("llava",)
# What a model's generation_config may say without changing greedy search.
_HARMLESS = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "use_cache"} | {
    "do_sample", "temperature", "top_p", "top_k", "max_length", "max_new_tokens", "num_beams", "cache_implementation",
}  # fmt: skip
FEATURE_BYTES = 4 * 2**30  # on the device: 900 images of LLaVA-1.5 at 16 bits
# Largest difference of log-probabilities between the two ways on the made-up prompt, in shares of their spread.
_TOLERANCE = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.2}


def why_not(model: Any) -> str:
    """Why prefixes cannot be shared with this model; empty if they can."""
    kind = model.config.model_type
    if kind not in TYPES:
        return f"model type {kind}"
    text = model.config.get_text_config()
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        return "sliding-window attention"
    if text._attn_implementation != "sdpa":
        return f"attention {text._attn_implementation}"
    odd = set(model.generation_config.to_diff_dict()) - _HARMLESS
    return f"generation_config has {', '.join(sorted(odd))}" if odd else ""


class Shared:
    """Answers and log-likelihoods of batches of `Group`s.

    Attributes:
        seconds: where the time went (image, vision, prefix, suffix, decode); exact only while `timed` is true, since then the
            device is waited for at each turn.
    """

    def __init__(self, model: Any, processor: Any, images: Any, options: config.Lvlm, image_tokens: int) -> None:
        import torch

        self.model, self.processor, self.images, self.options = model, processor, images, options
        self.image_tokens, self.image = image_tokens, processor.image_token_id
        self.prefill = Prefill(model)
        self.steps = Steps(self.prefill, record=model.device.type == "cuda")
        self.features = Features(self._features, FEATURE_BYTES)
        self.threads = pool()
        self.stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None  # of the images' copies
        self.timed = False
        self.seconds: dict[str, float] = {}
        ends = model.generation_config.eos_token_id
        ends = processor.tokenizer.eos_token_id if ends is None else ends
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])

    @classmethod
    def build(
        cls, model: Any, processor: Any, images: Any, options: config.Lvlm, image_tokens: int, *, check: bool
    ) -> "Shared | None":
        """One for this model, or None; says in the log which and why."""
        reason = why_not(model)
        if not reason:
            made = cls(model, processor, _MadeUp(), options, image_tokens)
            if options.compile and model.device.type == "cuda":
                fused.enable(model.model.language_model, list(model.model.language_model.layers), train=False)
            reason = made.differs() if check else ""
            made.images = images
        if reason:
            log.info("answers by the model's own generate, without shared prefixes: %s", reason)
            return None
        log.info("answers with shared prefixes")
        return made

    def ahead(self, groups: Sequence[Group]) -> Ahead:
        """Start to decode the images of `groups`; ask the result for the pixels of each."""
        names = [name for one in groups for name in one.images]
        return Ahead(self.threads, self._pixels, names, self.features.__contains__)

    def generate(
        self,
        batch: Sequence[Group],
        pixels: Any,
        limit: int,
        temperature: float,
        seeds: Sequence[Sequence[int]],
        room: int,
    ) -> list[list[list[int]]]:
        """New tokens of each prompt, by group and row; see `decode.generate`."""
        import torch

        with torch.inference_mode():
            layout = self._prefix(batch, pixels, min(STEPS, limit - 1))
            with self._clock("suffix"):
                hidden = self.prefill.suffix(layout)
            with self._clock("decode"):
                return generate(
                    self.prefill,
                    self.steps,
                    layout,
                    hidden,
                    limit=limit,
                    ends=self.ends,
                    temperature=temperature,
                    seeds=seeds,
                    room=room,
                )

    def loglik(self, batch: Sequence[Group], pixels: Any, sizes: Sequence[Sequence[int]]) -> list[float]:
        """Mean log-probability of the last `sizes` tokens of each suffix, group by group."""
        import torch

        with torch.inference_mode():
            layout = self._prefix(batch, pixels, 0)
            with self._clock("suffix"):
                hidden = self.prefill.suffix(layout)
                # [answer tokens of all prompts, hidden]: nothing else goes through the head
                at = [
                    (g, first + place)
                    for g, (one, own) in enumerate(zip(batch, sizes, strict=True))
                    for first, suffix, size in zip(layout.first[g], one.suffixes, own, strict=True)
                    for place in range(len(suffix) - size - 1, len(suffix) - 1)
                ]
                groups, spots = torch.tensor(at, device=hidden.device).unbind(1)
                target = layout.suffix_ids[groups, spots + 1]
                flat = [size for own in sizes for size in own]
                scores = []
                for part in range(0, len(at), 4096):
                    piece = slice(part, part + 4096)
                    logits = self.prefill.head(hidden[groups[piece], spots[piece]]).float()
                    scores.append(logits.log_softmax(-1).gather(-1, target[piece, None])[:, 0])
                means = [own.mean() for own in torch.cat(scores).split(flat)]
                return [float(value) for value in torch.stack(means).tolist()]

    def reserve(self, places: int) -> None:
        """Tell how many places in the key-value cache the largest batch may take."""
        self.prefill.slots.least = places if self.model.device.type == "cuda" else 0

    def clear(self) -> None:
        """Give back the memory of caches and graphs."""
        self.steps.clear()
        self.prefill.slots.clear()
        self.features.clear()

    def differs(self) -> str:
        """How answers to made-up prompts differ from the model's own forward pass; empty if they do not."""
        import torch

        made = [
            prompts.build(question, "a", [prompts.Reference("b", "a red circle")])
            for question in ("What?", "How many are there?")
        ]
        texts = [prompts.chat(self.processor, prompt) for prompt in made]
        parts = [split(processing.token_ids(self.processor, text), self.image) for text in texts]
        if any(not suffix for _, suffix in parts):
            return "the chat template closes with the image"
        rows = [(row, *part, prompt.images, 4) for row, (part, prompt) in enumerate(zip(parts, made, strict=True))]
        batch = group(rows, self.image, self.image_tokens)
        worst = 0.0
        try:
            with torch.inference_mode():
                ahead = self.ahead(batch)
                found = self.generate(batch, ahead, 4, 0.0, [[0] * len(one.rows) for one in batch], 2**30)
                new = {row: ids for one, own in zip(batch, found, strict=True) for row, ids in zip(one.rows, own, strict=True)}
                longer = [(row, first, (*last, *new[row]), images, 0) for row, first, last, images, _ in rows]
                ours = self._logits(group(longer, self.image, self.image_tokens), ahead)
                for row, _, suffix, images, _ in longer:
                    pictures = [[self.images.open(name) for name in images]]
                    inputs = processing.encode(self.processor, [texts[row]], pictures, padding_side="right", lvlm=self.options)
                    inputs = inputs.to(self.model.device, dtype=self.model.dtype)
                    ids = torch.cat(
                        [inputs["input_ids"], torch.tensor([new[row]], device=self.model.device, dtype=torch.long)], 1
                    )
                    inputs["input_ids"], inputs["attention_mask"] = ids, torch.ones_like(ids)
                    plain = self.model(**inputs).logits[0, -len(suffix) :].float()
                    spread = float(plain.std()) or 1.0
                    worst = max(worst, float((plain - ours[row].float()).abs().max()) / spread)
                    for place, token in enumerate(new[row], len(suffix) - len(new[row]) - 1):
                        worst = max(worst, float(plain[place].max() - plain[place, token]) / spread)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self.clear()
        return f"logits differ by {worst:.2g} of their spread" if not worst <= _TOLERANCE[self.options.dtype] else ""

    def _logits(self, batch: Sequence[Group], pixels: Any) -> dict[int, Any]:
        """Logits [tokens, vocabulary] of each prompt's whole suffix, by row; for the check."""
        layout = self._prefix(batch, pixels, 0)
        hidden = self.prefill.suffix(layout)
        return {
            row: self.prefill.head(hidden[g, first : first + len(suffix)])
            for g, one in enumerate(batch)
            for row, first, suffix in zip(one.rows, layout.first[g], one.suffixes, strict=True)
        }

    def _prefix(self, batch: Sequence[Group], pixels: Any, steps: int) -> Layout:
        """Read the prefixes of a batch, with room for some steps."""
        expanded = [_expand(one.prefix, self.image, self.image_tokens) for one in batch]
        layout = Layout(batch, expanded, self._pad, self.model.device)
        names = [name for one in batch for name in one.images]
        with self._clock("image"):
            new = {name: pixels(name) for name in dict.fromkeys(names) if name not in self.features}
            for name in names:  # the other lane may have cached some meanwhile
                pixels.drop(name)
        with self._clock("vision"):
            features = self.features(names, new)
        with self._clock("prefix"):
            self.prefill.prefix(layout, features, self.image, places(layout.end, layout.width, steps))
        pixels.fill()  # the device is busy for a while: now the threads may take Python's lock
        return layout

    @property
    def _pad(self) -> int:
        """A token to fill up with; any but the image's will do, since it is masked."""
        pad = self.processor.tokenizer.pad_token_id
        return pad if pad != self.image else self.processor.tokenizer.eos_token_id

    def _features(self, pixels: Any) -> Any:
        import torch

        found = self.model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        return torch.stack(list(found))

    def _pixels(self, name: str) -> Any:
        """[3, height, width] of one image, as the processor makes them, on the device; in a thread, so that no batch waits."""
        import torch

        made = processing.pixels(self.processor, self.images.open(name), self.options).to(self.model.dtype)
        if self.stream is None:
            return made
        with torch.cuda.stream(self.stream):  # the model's own stream has steps under way
            moved = made.to(self.model.device)
        moved.record_stream(torch.cuda.default_stream(self.model.device))
        return moved

    @contextmanager
    def _clock(self, what: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    def _wait(self) -> None:
        import torch

        if self.timed and self.model.device.type == "cuda":
            torch.cuda.synchronize()


class _MadeUp:
    """Two images for the check, by name."""

    def open(self, name: str) -> Any:
        """Stripes, across for "a" and along for others."""
        import numpy as np
        from PIL import Image

        stripes = np.indices((48, 64))[int(name == "a")] * 5 % 256
        return Image.fromarray(np.stack([stripes, 255 - stripes, stripes // 2], -1).astype(np.uint8))


def _expand(prefix: Sequence[int], image: int, image_tokens: int) -> list[int]:
    return [token for own in prefix for token in ([own] * image_tokens if own == image else [own])]
