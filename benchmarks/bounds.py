"""Where the time of `answers.py` goes, and the least that each part could take.

The parts are timed in a second run of the same rows, in which the device is waited for at each turn. They are set beside the
time of a row in the stage itself: what is left is the host's, and waiting; much of it goes on beside the device's work.

The least time of vision, prefixes and suffixes is that of their matrix products at the speed of a large one. A step of new
tokens reads all weights of the decoder, unless its products take longer, and the keys and values of all places of its groups,
at the speed of a large copy; both are counted for the shapes that the batches had, padding included.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import common

from surf import processing, prompts, workers
from surf.models import Request, decode
from surf.models.prefix import split


class Limits(NamedTuple):
    """What the device can do, measured."""

    flops: float  # operations a second of a large matrix product in the model's arithmetic
    bytes: float  # read and written a second by a large copy


class Products(NamedTuple):
    """Operations in matrix products: two a weight and token."""

    vision: float
    prefix: float
    suffix: float  # with the head for the first new token
    new: float
    unshared: float  # all of it, if each prompt was read in full

    @property
    def shared(self) -> float:
        """All of it, each prefix read once."""
        return self.vision + self.prefix + self.suffix + self.new


def limits(network: Any) -> Limits:
    """Measure them."""
    import torch

    gpu = network.device.type == "cuda"
    side, size, times = (8192, 2**32, 50) if gpu else (512, 2**24, 5)
    a = torch.randn(side, side, device=network.device, dtype=network.dtype)
    source = torch.ones(size, device=network.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return Limits(
        2 * side**3 / common.seconds(lambda: a @ a, times), 2 * size / common.seconds(lambda: target.copy_(source), times)
    )


def products(model: Any, requests: Sequence[Request], lengths: dict[int, int]) -> Products:
    """What the requests take; `lengths`: tokens of their answers, by their seeds."""
    network, processor = model.model, model.processor
    decoder, head = _weights(network)
    tower = sum(own.numel() for own in network.model.vision_tower.parameters()) * (model.image_tokens + 1)
    tower += sum(own.numel() for own in network.model.multi_modal_projector.parameters()) * model.image_tokens
    prefixes: dict[Any, int] = {}
    images: set[str] = set()
    suffix = new = unshared = 0.0
    for request in requests:
        ids = processing.token_ids(processor, prompts.chat(processor, request.prompt))
        first, rest = split(ids, processor.image_token_id)
        length = len(first) + len(request.prompt.images) * (model.image_tokens - 1)
        prefixes[first, request.prompt.images] = length
        images.update(request.prompt.images)
        suffix += len(rest) * decoder + head
        new += (lengths[request.seed] - 1) * (decoder + head)
        unshared += length * decoder + len(request.prompt.images) * tower
    unshared += suffix + new
    return Products(*(2 * part for part in (len(images) * tower, sum(prefixes.values()) * decoder, suffix, new, unshared)))


def parts(
    model: Any, requests: Sequence[Request], lengths: dict[int, int], limit: int, whole: float, bound: Limits
) -> list[list[object]]:
    """Lines of a table: (part, ms a sample, share, least ms a sample, their ratio, what bounds it).

    Args:
        limit: new tokens, at most.
        whole: seconds a sample in the stage.
    """
    engine = model.shared
    engine.features.clear()
    engine.timed, engine.seconds = True, {}
    with _steps() as shapes:  # in a lane, as in the stage: see `workers.lanes`
        list(workers.lanes([requests], lambda rows: model.respond(rows, max_new_tokens=limit)))
    engine.timed = False
    work = products(model, requests, lengths)
    rows = sum(groups * width for groups, width, _ in shapes) / max(1, len(shapes))
    plan = {  # of each part: its name, the least seconds it could take, what bounds it
        "image": ("waiting for images", 0.0, ""),
        "vision": ("vision", work.vision / bound.flops, "products"),
        "prefix": ("prefixes", work.prefix / bound.flops, "products"),
        "suffix": ("suffixes", work.suffix / bound.flops, "products"),
        "decode": (f"new tokens, {rows:.0f} rows a step", sum(_step(model.model, one, bound) for one in shapes), "memory"),
    }
    lines = []
    for part, (name, least, by) in plan.items():
        lines.append(_line(name, engine.seconds.get(part, 0.0) / len(requests), least / len(requests), by, whole))
    left = whole - sum(engine.seconds.values()) / len(requests)
    lines.append(_line("host, and what the second run differs by", left, 0.0, "", whole))
    lines.append(_line("all", whole, sum(least for _, least, _ in plan.values()) / len(requests), "", whole))
    return lines


def _line(name: str, seconds: float, least: float, by: str, whole: float) -> list[object]:
    share = [1000 * least, f"{100 * least / seconds:.0f} %"] if least and seconds else ["", ""]
    return [name, 1000 * seconds, f"{100 * seconds / whole:.0f} %", *share, by]


def kernels(model: Any, requests: Sequence[Request], limit: int) -> list[list[object]]:
    """The GPU's kernels that take most time: (name, calls, share of all kernels' time)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        model.respond(requests, max_new_tokens=limit)
    made = sorted(found.key_averages(), key=lambda one: -one.self_device_time_total)
    whole = sum(one.self_device_time_total for one in made)
    return [[one.key[:90], one.count, f"{one.self_device_time_total / whole:.1%}"] for one in made[:12]]


@contextmanager
def _steps() -> Iterator[list[tuple[int, int, int]]]:
    """(groups, rows of a group, places of a group) of each step of new tokens."""
    shapes: list[tuple[int, int, int]] = []
    plain = decode._Step.step

    def step(self: Any, uniform: Any) -> None:
        groups, _, width, places = self.mask.shape
        shapes.append((groups, width, places))
        plain(self, uniform)

    decode._Step.step = step  # type: ignore[method-assign]
    try:
        yield shapes
    finally:
        decode._Step.step = plain  # type: ignore[method-assign]


def _step(network: Any, shape: tuple[int, int, int], bound: Limits) -> float:
    """Least seconds of a step."""
    groups, width, places = shape
    text, size = network.config.get_text_config(), network.dtype.itemsize
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kept = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size * size
    weights = sum(_weights(network))
    linear = max(weights * size / bound.bytes, 2 * weights * groups * width / bound.flops)
    return linear + groups * places * kept / bound.bytes


def _weights(network: Any) -> tuple[int, int]:
    """Numbers in the decoder's layers, and in its head."""
    layers = sum(own.numel() for layer in network.model.language_model.layers for own in layer.parameters())
    return layers, network.get_output_embeddings().weight.numel()
