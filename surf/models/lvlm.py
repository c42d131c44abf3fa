"""Vision-language models by transformers: batched, deterministic answers."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from surf import config, processing
from surf.errors import SurfError
from surf.images import Images
from surf.models import Request, decode, prefix
from surf.models.sampling import Pick
from surf.models.shared import Shared

log = logging.getLogger("surf")


def load(options: config.Lvlm, images: Images, model: str | None = None) -> "Lvlm":
    """The model of the config's `lvlm` section (or the one in folder `model`), on the GPU if there is one.

    Weights are read from safetensors only: a pickle could run code.

    Raises:
        SurfError: the model or its processor cannot be loaded.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    name = model or options.model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = processing.load_processor(options.model_copy(update={"model": name}))
    try:
        network = AutoModelForImageTextToText.from_pretrained(
            name, dtype=getattr(torch, options.dtype), use_safetensors=True, attn_implementation="sdpa"
        )
    except (OSError, ValueError, KeyError) as error:
        raise SurfError(
            f"the model cannot be loaded ({str(error).splitlines()[0]})",
            where=f"lvlm.model = {name!r}",
            expected="a folder or a hub name with safetensors weights of an image-text-to-text model",
        ) from error
    processing.stop_at_end(network, processor)
    return Lvlm(network.eval().to(device), processor, images, options)


class Lvlm:
    """A `Responder`. Prompts of similar length share a batch; no batch changes an answer beyond float noise.

    Where the model allows it (`shared.why_not`), prompts with the same images and the same text before the question share
    one prefix; all other prompts go through the model's own `generate`.

    `respond` and `loglik` may be called from two threads: one prepares its prompts while the other one uses the model.

    Args:
        share: whether prefixes are shared; None decides.
    """

    def __init__(self, model: Any, processor: Any, images: Images, options: config.Lvlm, share: bool | None = None) -> None:
        import torch

        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans each new shape anew, and there are many
        self.model, self.processor, self.images, self.options = model, processor, images, options
        self.image_tokens = processing.image_tokens(processor, options)
        self.budget = options.batch_tokens  # tokens in one batch; shrinks when memory runs out
        self.lock = threading.Lock()
        self.shared: Shared | None = None
        if share is not False:
            self.shared = Shared.build(model, processor, images, options, self.image_tokens, check=share is None)

    def respond(self, requests: Sequence[Request], *, max_new_tokens: int, temperature: float = 0.0) -> list[str]:
        """See `surf.models.Responder`."""
        requests, texts, ids = self._fitted(requests, [max_new_tokens] * len(requests))
        answers = [""] * len(requests)

        def plain(rows: Sequence[int]) -> list[str]:
            return self._generate([requests[r] for r in rows], [texts[r] for r in rows], max_new_tokens, temperature)

        def shared(batch: Sequence[prefix.Group], pixels: Any) -> list[str]:
            assert self.shared is not None
            self.shared.reserve(self.budget)
            seeds = [[requests[row].seed for row in one.rows] for one in batch]
            made = self.shared.generate(batch, pixels, max_new_tokens, temperature, seeds, self.budget)
            return self._texts([tokens for own in made for tokens in own])

        self._run(requests, ids, [0] * len(ids), max_new_tokens, plain, shared, answers)
        return answers

    def loglik(self, requests: Sequence[Request], golds: Sequence[str]) -> list[float]:
        """See `surf.models.Responder`."""
        requests, *_ = self._fitted(requests, processing.answer_tokens(self.processor, golds))
        whole, ids, sizes = processing.answered(self.processor, [request.prompt for request in requests], golds)
        values = [0.0] * len(requests)

        def plain(rows: Sequence[int]) -> list[float]:
            return self._loglik([requests[r] for r in rows], [whole[r] for r in rows], [sizes[r] for r in rows])

        def shared(batch: Sequence[prefix.Group], pixels: Any) -> list[float]:
            assert self.shared is not None
            self.shared.reserve(self.budget)
            return self.shared.loglik(batch, pixels, [[sizes[row] for row in one.rows] for one in batch])

        self._run(requests, ids, sizes, 0, plain, shared, values)
        return values

    def _run(
        self,
        requests: Sequence[Request],
        ids: Sequence[Sequence[int]],
        kept: Sequence[int],
        new_tokens: int,
        plain: Callable[[Sequence[int]], list[Any]],
        shared: Callable[[Sequence[prefix.Group], Any], list[Any]],
        results: list[Any],
    ) -> None:
        """Fill `results`, batch by batch. The last `kept` tokens of a prompt must stand in its suffix."""
        sharing, alone = [], []
        for row, (request, own) in enumerate(zip(requests, ids, strict=True)):
            first, suffix = prefix.split(own, self.processor.image_token_id)
            if self.shared and first and len(suffix) > kept[row]:
                new = min(new_tokens, max(prefix.SHORT, 2 * request.guess) if request.guess else new_tokens)
                sharing.append((row, first, suffix, request.prompt.images, new))
            else:
                alone.append(row)
        groups = prefix.group(sharing, self.processor.image_token_id, self.image_tokens)
        pixels = self.shared.ahead(groups) if self.shared else None
        try:
            with self.lock:
                while groups:
                    batch = prefix.take(groups, self.budget, self.options.batch_size)
                    try:
                        made = self._within_memory(lambda b: shared(b, pixels), batch, prefix.cost(batch))
                    except decode.Full:  # a wrong guess: once more, with room for the longest answers
                        groups[:0] = [replace(one, new=new_tokens) for one in batch]
                        continue
                    if made is None:
                        groups[:0] = batch
                        continue
                    for row, result in zip((row for one in batch for row in one.rows), made, strict=True):
                        results[row] = result
                lengths = {row: self._length(requests[row], ids[row], new_tokens) for row in alone}
                alone.sort(key=lambda row: (-lengths[row], requests[row].prompt.text, row))
                while alone:
                    rows = alone[: max(1, min(self.options.batch_size, self.budget // lengths[alone[0]]))]
                    made = self._within_memory(plain, rows, lengths[rows[0]] * len(rows))
                    if made is None:
                        continue
                    del alone[: len(rows)]
                    for row, result in zip(rows, made, strict=True):
                        results[row] = result
        finally:
            if pixels:
                pixels.close()

    def _fitted(self, requests: Sequence[Request], new: Sequence[int]) -> tuple[list[Request], list[str], list[list[int]]]:
        context = processing.context_of(self.model.config)
        return processing.fitted(self.processor, requests, self.options, self.images, context, new)

    def _length(self, request: Request, ids: Sequence[int], new_tokens: int) -> int:
        images = processing.prompt_image_tokens(self.processor, request.prompt.images, self.options, self.images)
        return len(ids) + images + new_tokens

    def _within_memory(self, work: Callable[[Any], list[Any]], batch: Sequence[Any], cost: int) -> list[Any] | None:
        """Run a batch; None if the device's memory does not suffice, after which batches are half as large for good."""
        import torch

        try:
            return work(batch)
        except torch.OutOfMemoryError:
            prompts_ = sum(len(one.rows) if isinstance(one, prefix.Group) else 1 for one in batch)
            if prompts_ == 1:
                raise
        self.budget = cost // 2
        log.warning("out of memory with %d prompts of %d tokens: batches of %d tokens from now on", prompts_, cost, self.budget)
        if self.shared:
            self.shared.clear()
        torch.cuda.empty_cache()
        return None

    def _texts(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        return [text.strip() for text in self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def _generate(self, requests: Sequence[Request], texts: Sequence[str], limit: int, temperature: float) -> list[str]:
        import torch
        from transformers import LogitsProcessorList

        batch = self._encode(requests, texts, "left")
        noise = LogitsProcessorList([Pick([request.seed for request in requests], temperature)] if temperature else [])
        tokenizer = self.processor.tokenizer
        with torch.inference_mode():
            ids = self.model.generate(
                **batch,
                max_new_tokens=limit,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                num_beams=1,
                logits_processor=noise,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
        return self._texts(ids[:, batch["input_ids"].shape[1] :])

    def _loglik(self, requests: Sequence[Request], texts: Sequence[str], sizes: Sequence[int]) -> list[float]:
        """Mean log-probability of the last `sizes` tokens of each text."""
        import torch

        batch = self._encode(requests, texts, "right")
        # the processor widens each <image> tag, all of them before the answer: count the answer from the end
        ends = batch["attention_mask"].sum(1).tolist()
        places = sorted({place for end, size in zip(ends, sizes, strict=True) for place in range(end - size - 1, end - 1)})
        with torch.inference_mode():
            logits = self.model(**batch, logits_to_keep=torch.tensor(places, device=self.model.device)).logits
        values = []
        for row, (end, size) in enumerate(zip(ends, sizes, strict=True)):
            target = batch["input_ids"][row, end - size : end]
            first = places.index(end - size - 1)
            scores = logits[row, first : first + size].float().log_softmax(-1)
            values.append(float(scores.gather(-1, target[:, None]).mean()))
        return values

    def _encode(self, requests: Sequence[Request], texts: Sequence[str], side: Literal["left", "right"]) -> Any:
        pictures = [[self.images.open(name) for name in request.prompt.images] for request in requests]
        batch = processing.encode(self.processor, list(texts), pictures, padding_side=side, lvlm=self.options)
        return batch.to(self.model.device, dtype=self.model.dtype)
