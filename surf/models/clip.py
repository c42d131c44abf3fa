"""CLIP image towers by open_clip."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from surf import config
from surf.errors import ImageError, SurfError
from surf.images import Images


def load(options: config.Embed, images: Images) -> "Clip":
    """The encoder of the config's `embed` section, on the GPU if there is one.

    Raises:
        SurfError: the model or its weights cannot be loaded.
    """
    import open_clip
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            options.model, pretrained=options.pretrained, precision=options.precision, device=device
        )
    except Exception as error:
        raise SurfError(
            f"the CLIP model cannot be loaded ({error})",
            where=f"embed.model = {options.model!r}, embed.pretrained = {options.pretrained!r}",
            expected="an open_clip model and weights tag, or local-dir:FOLDER with pretrained null",
        ) from error
    return Clip(model.eval(), transform, images, options, device)


class Clip:
    """An `Encoder`. Images are decoded by threads, one batch ahead of the model."""

    def __init__(self, model: Any, transform: Any, images: Images, options: config.Embed, device: str) -> None:
        self.model, self.transform, self.images, self.options, self.device = model, transform, images, options, device
        self.dim = int(model.visual.output_dim)

    def encode(self, names: Sequence[str]) -> tuple[np.ndarray, dict[str, str]]:
        """See `surf.models.Encoder`."""
        import torch

        vectors = np.zeros((len(names), self.dim), np.float32)
        errors: dict[str, str] = {}
        with torch.inference_mode():
            for start, batch in self._batches(names):
                good = [row for row, pixels in enumerate(batch) if not isinstance(pixels, ImageError)]
                errors.update({names[start + row]: str(e) for row, e in enumerate(batch) if isinstance(e, ImageError)})
                if not good:
                    continue
                # Short batches are filled up: with one shape for all, a row's bits do not depend on its neighbours,
                # and so not on the number of shards.
                pixels = torch.stack([batch[row] for row in good] + [batch[good[0]]] * (self.options.batch_size - len(good)))
                pixels = pixels.to(self.device, dtype=next(self.model.parameters()).dtype)
                features = self.model.encode_image(pixels)[: len(good)].float()
                features = torch.nn.functional.normalize(features, dim=-1)
                vectors[[start + row for row in good]] = features.cpu().numpy()
        return vectors, errors

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), dim], L2-normalised. CLIP reads as many tokens of a text as fit into its context (77)."""
        import open_clip
        import torch

        tokenize = open_clip.get_tokenizer(self.options.model)
        vectors = np.zeros((len(texts), self.dim), np.float32)
        size = self.options.batch_size
        with torch.inference_mode():
            for start in range(0, len(texts), size):
                batch = list(texts[start : start + size])
                tokens = tokenize(batch + [""] * (size - len(batch))).to(self.device)  # one shape for all, as for images
                features = torch.nn.functional.normalize(self.model.encode_text(tokens).float(), dim=-1)
                vectors[start : start + len(batch)] = features[: len(batch)].cpu().numpy()
        return vectors

    def _batches(self, names: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        """(first row, decoded images or their errors), the next batch being decoded meanwhile."""
        size = self.options.batch_size
        with ThreadPoolExecutor(max(1, self.options.workers)) as pool:
            ahead: list[tuple[int, list[Future[Any]]]] = []
            for start in range(0, len(names), size):
                ahead.append((start, [pool.submit(self._pixels, name) for name in names[start : start + size]]))
                if len(ahead) > 1:
                    first, futures = ahead.pop(0)
                    yield first, [future.result() for future in futures]
            for first, futures in ahead:
                yield first, [future.result() for future in futures]

    def _pixels(self, name: str) -> Any:
        try:
            return self.transform(self.images.open(name))
        except ImageError as error:
            return error
