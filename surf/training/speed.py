"""How fast the training is, against what the machine could do."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surf.samples import Sample

# Dense bfloat16 FLOP/s of one GPU, from NVIDIA's data sheets (SXM editions), by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}


@dataclass(frozen=True)
class Cost:
    """What the FLOPs of a sample depend on."""

    text: int  # weights of the language model's matrices, output head included, input embeddings not
    vision: int  # weights of the vision tower
    layers: int
    width: int  # heads times their size
    full: bool  # weights are trained, not adapters beside them

    def flops(self, sample: Sample) -> float:
        """FLOPs that training on one sample needs, without what is computed again to save memory.

        A weight costs 2 FLOPs a token forward, 2 for the gradient of its input, and 2 for its own (Kaplan et al. 2020, arXiv
        2001.08361, table 1), which adapters do without. Causal attention costs 2 * layers * width * tokens^2 forward and twice
        that backward (Dao 2023, arXiv 2307.08691, section 4.1). The frozen tower costs 2 a weight and image token.
        """
        tokens = sample.length
        dense = (6 if self.full else 4) * self.text * tokens
        attention = 6 * self.layers * self.width * tokens**2
        return float(dense + attention + 2 * self.vision * sample.image_tokens)


def cost(model: Any, full: bool = True) -> Cost:
    """The cost of a Hugging Face model, also if its weights are spread over processes."""
    text = model.config.get_text_config()
    sizes = {name: int(getattr(weight, "ds_numel", weight.numel())) for name, weight in model.named_parameters()}
    vision = {name: size for name, size in sizes.items() if "vision" in name or ".visual." in name}
    embedded = sum(size for name, size in sizes.items() if "embed_tokens" in name)
    head = model.get_output_embeddings().weight
    tied = getattr(head, "ds_numel", head.numel()) if not any("lm_head" in name for name in sizes) else 0
    rest = sum(sizes.values()) - sum(vision.values()) - embedded + int(tied)
    width = text.num_attention_heads * getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    return Cost(rest, sum(vision.values()), text.num_hidden_layers, width, full)


def peak() -> float | None:
    """FLOP/s of this process's GPU by its data sheet; None if unknown."""
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((value for part, value in PEAKS.items() if part in name), None)


class Meter:
    """Samples a second, MFU, memory and the share of time spent waiting for data, over the last 20 steps."""

    def __init__(self, samples: Sequence[Sample], group: int, processes: int, model_cost: Cost) -> None:
        self.samples, self.group, self.processes, self.cost = samples, group, processes, model_cost
        self.peak = peak()
        self.marks: deque[tuple[float, float, int]] = deque(maxlen=21)  # time, seconds waited so far, steps
        self.waited = 0.0

    def step(self, number: int) -> None:
        """Step `number` is done (0: the first one begins)."""
        self.marks.append((time.monotonic(), self.waited, number))

    def wait(self, seconds: float) -> None:
        """Time spent waiting for the next batch."""
        self.waited += seconds

    def figures(self) -> dict[str, float]:
        """samples_per_second (all processes), mfu (0 to 1; unknown GPUs: left out), memory_gib, data_wait (0 to 1)."""
        import torch

        (start, waited, first), (end, waited_end, last) = self.marks[0], self.marks[-1]
        seconds = max(end - start, 1e-9)
        seen = self.samples[first * self.group : last * self.group]
        found = {"samples_per_second": len(seen) / seconds, "data_wait": (waited_end - waited) / seconds}
        if self.peak:
            found["mfu"] = sum(map(self.cost.flops, seen)) / seconds / self.processes / self.peak
        if torch.cuda.is_available():
            found["memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
        return {**found, "seconds_per_step": seconds / max(last - first, 1)}
