"""Vision-language models by transformers: batched, deterministic answers."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from surf import adapters, config, processing, prompts
from surf.errors import SurfError
from surf.images import Images
from surf.models import Request


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
    """A `Responder`. Prompts of similar length share a batch; no batch changes an answer beyond float noise."""

    def __init__(self, model: Any, processor: Any, images: Images, options: config.Lvlm) -> None:
        self.model, self.processor, self.images, self.options = model, processor, images, options
        self.image_tokens = processing.image_tokens(processor, options)

    def respond(self, requests: Sequence[Request], *, max_new_tokens: int, temperature: float = 0.0) -> list[str]:
        """See `surf.models.Responder`."""
        texts = [prompts.chat(self.processor, request.prompt) for request in requests]
        answers = [""] * len(requests)
        for rows in self._batches(requests, texts, max_new_tokens):
            batch = [requests[row] for row in rows]
            made = self._halving(
                lambda r, t: self._generate(r, t, max_new_tokens, temperature), batch, [texts[i] for i in rows]
            )
            for row, answer in zip(rows, made, strict=True):
                answers[row] = answer
        return answers

    def loglik(self, requests: Sequence[Request], golds: Sequence[str]) -> list[float]:
        """See `surf.models.Responder`."""
        texts = [prompts.chat(self.processor, request.prompt) for request in requests]
        values = [0.0] * len(requests)
        for rows in self._batches(requests, texts, max(map(len, golds), default=0)):
            batch = [requests[row] for row in rows]
            made = self._halving(self._loglik, batch, [golds[row] for row in rows])
            for row, value in zip(rows, made, strict=True):
                values[row] = value
        return values

    def _generate(self, requests: Sequence[Request], texts: Sequence[str], limit: int, temperature: float) -> list[str]:
        import torch
        from transformers import LogitsProcessorList

        batch = self._encode(requests, texts, "left")
        noise = LogitsProcessorList([_Noise([request.seed for request in requests], temperature)] if temperature else [])
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
        new = ids[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _loglik(self, requests: Sequence[Request], golds: Sequence[str]) -> list[float]:
        import torch

        whole = [
            processing.with_end(self.processor, prompts.chat(self.processor, request.prompt, gold))
            for request, gold in zip(requests, golds, strict=True)
        ]
        starts = [
            len(processing.token_ids(self.processor, prompts.chat(self.processor, request.prompt))) for request in requests
        ]
        lengths = [len(processing.token_ids(self.processor, text)) for text in whole]
        batch = self._encode(requests, whole, "right")
        with torch.inference_mode():
            logits = self.model(**batch).logits
        values = []
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            # the processor widens each <image> tag, all of them before the answer: count the answer from the end
            size = length - start
            end = int(batch["attention_mask"][row].sum())
            target = batch["input_ids"][row, end - size : end]
            scores = logits[row, end - size - 1 : end - 1].float().log_softmax(-1)
            values.append(float(scores.gather(-1, target[:, None]).mean()))
        return values

    def _encode(self, requests: Sequence[Request], texts: Sequence[str], side: Literal["left", "right"]) -> Any:
        pictures = [[self.images.open(name) for name in request.prompt.images] for request in requests]
        batch = processing.encode(self.processor, list(texts), pictures, padding_side=side, lvlm=self.options)
        return batch.to(self.model.device, dtype=self.model.dtype)

    def _batches(self, requests: Sequence[Request], texts: Sequence[str], new_tokens: int) -> Iterator[list[int]]:
        """Rows of each batch: sorted by length, filled up to `batch_size` prompts and `batch_tokens` padded tokens."""
        if not requests:
            return
        lengths = [
            len(processing.token_ids(self.processor, text)) + self._image_tokens(request.prompt.images) + new_tokens
            for request, text in zip(requests, texts, strict=True)
        ]
        batch: list[int] = []
        longest = 0
        for row in sorted(range(len(requests)), key=lambda row: (lengths[row], requests[row].prompt.text, row)):
            longest = max(longest, lengths[row])
            full = len(batch) == self.options.batch_size or longest * (len(batch) + 1) > self.options.batch_tokens
            if batch and full:
                yield batch
                batch, longest = [], lengths[row]
            batch.append(row)
        yield batch

    def _image_tokens(self, names: Sequence[str]) -> int:
        """Tokens of a prompt's images, less one tag each."""
        if adapters.of(self.processor).fixed:
            return len(names) * (self.image_tokens - 1)
        sizes = [self.images.size(name) for name in names]
        return sum(processing.image_tokens(self.processor, self.options, size, len(names) == 1) - 1 for size in sizes)

    def _halving(self, work: Any, requests: Sequence[Request], texts: Sequence[str]) -> list[Any]:
        """Run a batch; if the GPU's memory does not suffice, run its halves."""
        import torch

        try:
            return list(work(requests, texts))
        except torch.OutOfMemoryError:
            if len(requests) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(requests) // 2
        return self._halving(work, requests[:half], texts[:half]) + self._halving(work, requests[half:], texts[half:])


class _Noise:
    """Sampling as greedy search: argmax(logits / T + Gumbel noise) is a draw from softmax(logits / T).

    Each row's noise comes from its own counter-based generator, so the draw does not depend on the batch.
    """

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self.seeds, self.temperature, self.step = seeds, temperature, 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        size = scores.shape[-1]
        noise = [np.random.Generator(np.random.Philox(key=[seed, self.step])).gumbel(size=size) for seed in self.seeds]
        self.step += 1
        return scores.float() / self.temperature + torch.from_numpy(np.stack(noise).astype(np.float32)).to(scores.device)
