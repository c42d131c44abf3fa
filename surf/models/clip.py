"""CLIP image towers by open_clip."""

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from surf import config
from surf.errors import ImageError, SurfError
from surf.images import Images
from surf.models import jpeg, pipeline
from surf.telemetry import Meter

AHEAD = 2  # batches that are copied to the GPU, and decoded there, before the model asks for them
IN_FLIGHT = 2  # batches in the model at a time: the next one waits in line when one is done
T = TypeVar("T")


def load(options: config.Embed, images: Images) -> "Clip":
    """The encoder of the config's `embed` section, on the GPU if there is one.

    Raises:
        SurfError: the model or its weights cannot be loaded.
    """
    import open_clip
    import torch

    from surf.models import tower

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        _refuse_pickle(options)
        model, _, transform = open_clip.create_model_and_transforms(
            options.model, pretrained=options.pretrained, precision=_precision(options), device=device
        )
    except SurfError:
        raise
    except Exception as error:
        raise SurfError(
            f"the CLIP model cannot be loaded ({error})",
            where=f"embed.model = {options.model!r}, embed.pretrained = {options.pretrained!r}",
            expected="an open_clip model and weights tag, or local-dir:FOLDER with pretrained null",
        ) from error
    tower.rebuild(model.visual, options.precision)
    return Clip(model.eval(), transform, images, options, device)


def _refuse_pickle(options: config.Embed) -> None:
    """open_clip reads safetensors if there are any, else pickles; surf reads none, as a pickle could run code."""
    from open_clip import pretrained

    kind, _, name = options.model.partition(":")
    if kind == "local-dir":
        found = next(Path(name).glob("*.safetensors"), Path(name))
    elif kind == "hf-hub":
        found = Path(pretrained.download_pretrained_from_hf(name))
    elif Path(options.pretrained or "").is_file():
        found = Path(options.pretrained or "")
    else:
        found = Path(pretrained.download_pretrained(pretrained.get_pretrained_cfg(options.model, options.pretrained or "")))
    known = found != Path() and found.exists()  # of anything else open_clip says itself what is wrong
    if known and found.suffix != ".safetensors":
        raise SurfError(
            "its weights are pickled, or missing: a pickle could run code, so surf reads none",
            where=f"embed.model = {options.model!r}, embed.pretrained = {options.pretrained!r}: {found}",
            expected="weights as safetensors",
            next="choose a tag with such weights, or convert them with safetensors.torch.save_file",
        )


class Clip:
    """An `Encoder`. The GPU normalises; what comes before it is open_clip's own preprocessing, see `pipeline` and `jpeg`."""

    def __init__(self, model: Any, transform: Any, images: Images, options: config.Embed, device: str) -> None:
        import torch

        self.model, self.transform, self.options, self.device, self.meter = model, transform, options, device, Meter()
        self.dim = int(model.visual.output_dim)
        crop, mean, std = _split(transform)
        height, width = model.visual.image_size
        plain = model.visual.preprocess_cfg.get("resize_mode", "shortest") == "shortest" and height == width
        gpu = options.decode == "gpu" and plain and jpeg.available()

        def suits(data: bytes) -> bool:  # the file alone decides, so that no run differs from another
            return zlib.crc32(data) < options.gpu_share * 2**32 and jpeg.suits(data, images.max_pixels)

        on_gpu = suits if gpu else None
        self.decoder = pipeline.Decoder(images, crop, (height, width), options.decode != "exact", on_gpu)
        features = _features(model, mean.to(device), std.to(device), _precision(options))
        self.features = features if options.compile == "off" else torch.compile(features, mode=options.compile)
        # before the model where both want the GPU: pixels are what the model waits for
        self.side: Any = torch.cuda.Stream(priority=-1) if device == "cuda" else None

    def encode(self, names: Sequence[str]) -> tuple[np.ndarray, dict[str, str]]:
        """See `surf.models.Encoder`."""
        vectors = np.zeros((len(names), self.dim), np.float32)
        errors: dict[str, str] = {}
        for numbers, found, bad in self.stream(names):
            vectors[numbers] = found
            errors.update({names[number]: error for number, error in bad.items()})
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
        return _finite(vectors)

    def stream(self, names: Sequence[str]) -> Iterator[tuple[list[int], np.ndarray, dict[int, str]]]:
        """See `surf.models.Encoder`."""
        made = pipeline.batches(
            names,
            self.decoder,
            batch_size=self.options.batch_size,
            workers=self.options.workers,
            pinned=self.device == "cuda",
            meter=self.meter,
        )
        with closing(made), ThreadPoolExecutor(1, "pixels") as thread:  # nvJPEG blocks its caller: it must not be the model's
            decoded = _early(((batch, thread.submit(self._decode, batch)) for batch in made), AHEAD)
            begun = ((batch, self._start(*future.result())) for batch, future in decoded)
            for batch, wait in _early(begun, IN_FLIGHT - 1):
                yield _finish(batch, wait)

    def _decode(self, batch: pipeline.Batch) -> tuple[Any, Any]:
        """The batch's pixels on the model's device, and the event that says when they are there (None on a CPU)."""
        import torch

        with torch.inference_mode():
            if self.side is None:
                return self.decode(batch), None
            with self.meter("GPU decode" if batch.encoded else "transfer"), torch.cuda.stream(self.side):
                pixels, ready = self.decode(batch), torch.cuda.Event()
                ready.record()
                return pixels, ready

    def _start(self, pixels: Any, ready: Any) -> Callable[[], np.ndarray]:
        """Begin a batch; the function that is returned waits for it: float32 [batch size, dim]."""
        import torch

        with torch.inference_mode():
            if ready is None:
                with self.meter("model"):
                    vectors = self.features(pixels).numpy()
                return lambda: vectors
            main = torch.cuda.current_stream()
            main.wait_event(ready)
            pixels.record_stream(main)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            if self.options.compile != "off":
                torch.compiler.cudagraph_mark_step_begin()  # the last batch's vectors are on their way to the CPU
            result = self.features(pixels).to("cpu", non_blocking=True)
            end.record()

        def wait() -> np.ndarray:
            end.synchronize()
            self.meter.add("model", begin.elapsed_time(end) / 1000)
            return result.numpy()

        return wait

    def decode(self, batch: pipeline.Batch) -> Any:
        """The batch's pixels on the model's device, uint8 [batch size, height, width, 3], zeros where there is no image.

        Files left to the GPU are decoded; what it cannot read, Pillow may.
        """
        import torch

        whole = torch.zeros((self.options.batch_size, *self.decoder.size, 3), dtype=torch.uint8, device=self.device)
        for places, pixels in batch.pixels:
            whole[_at(places)] = pixels.to(self.device, non_blocking=True)
        found = jpeg.decode(list(batch.encoded.values()), self.decoder.size, self.device)
        good = [(place, pixels) for place, pixels in zip(batch.encoded, found, strict=True) if pixels is not None]
        if good:
            whole[_at([place for place, _ in good])] = torch.stack([pixels for _, pixels in good])
        for place in batch.encoded.keys() - {place for place, _ in good}:
            try:
                whole[place] = torch.from_numpy(self.decoder.pixels(batch.encoded[place].numpy().tobytes())).to(self.device)
            except ImageError as error:
                batch.errors[place] = str(error)
        return whole


def _early(items: Iterable[T], count: int) -> Iterator[T]:
    """The items, each asked for `count` items before it is handed on."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _at(places: Sequence[int]) -> Any:
    """An index for these places, which ascend; a slice where they follow one another, as they mostly do."""
    import torch

    if not places or places[-1] - places[0] == len(places) - 1:
        return slice(places[0], places[-1] + 1) if places else slice(0, 0)
    return torch.tensor(places)


def _precision(options: config.Embed) -> str:
    """open_clip's own word for the arithmetic of all but the products that `tower` replaces."""
    return "bf16" if options.precision == "fp8" else options.precision


def _finish(batch: pipeline.Batch, wait: Callable[[], np.ndarray]) -> tuple[list[int], np.ndarray, dict[int, str]]:
    vectors = wait()[: len(batch.numbers)]
    vectors[list(batch.errors)] = 0
    return batch.numbers, _finite(vectors), {batch.numbers[place]: error for place, error in batch.errors.items()}


def _finite(vectors: np.ndarray) -> np.ndarray:
    """`vectors`, which an index and a ranking could not deal with otherwise."""
    if not np.isfinite(vectors).all():
        raise SurfError(
            "the CLIP model gave a vector with NaN or infinity",
            where="embed",
            expected="finite numbers",
            next="check its weights, or set embed.precision to fp32",
        )
    return vectors


def _features(model: Any, mean: Any, std: Any, precision: str) -> Callable[[Any], Any]:
    """uint8 [n, height, width, 3] to unit vectors float32 [n, dim]: ToTensor, Normalize and the model."""
    import open_clip
    import torch

    dtype = open_clip.get_input_dtype(precision) or torch.float32

    def features(pixels: Any) -> Any:
        images = pixels.permute(0, 3, 1, 2).float().div(255).sub(mean).div(std).to(dtype)
        return torch.nn.functional.normalize(model.encode_image(images).float(), dim=-1)

    return features


def _split(transform: Any) -> tuple[Any, Any, Any]:
    """open_clip's transform in two: what works on PIL images, and the mean and deviation [3, 1, 1] of the colours."""
    import torch
    from torchvision import transforms

    *crop, to_tensor, normalize = transform.transforms
    if not isinstance(to_tensor, transforms.ToTensor) or not isinstance(normalize, transforms.Normalize):
        raise SurfError(f"open_clip preprocesses in another way: {transform}", where="open_clip", expected="release 3.3")
    mean, std = (torch.tensor(list(values)).view(3, 1, 1) for values in (normalize.mean, normalize.std))
    return transforms.Compose(crop), mean, std
