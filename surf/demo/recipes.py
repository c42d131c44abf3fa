"""Sizes and lengths of a training run of the world's models: the embedded example's, and the large one's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surf.demo.draw import STYLES, Style

PATCH = 16  # pixels


@dataclass
class Recipe:
    """Sizes and lengths of the training run; every field is a flag. The defaults are the embedded example's."""

    size: str = "small"  # key of STYLES
    seed: int = 0
    scenes: int = 5000  # training scenes, three images each
    vision_width: int = 96
    vision_layers: int = 4
    vision_head: int = 16
    text_width: int = 64
    clip_steps: int = 1200
    clip_batch: int = 128
    clip_rate: float = 2e-3
    retriever_steps: int = 0  # 0: the CLIP is the retriever
    retriever_batch: int = 1024  # scenes, three images each
    retriever_rate: float = 5e-4
    width: int = 96
    layers: int = 3
    head: int = 16
    lvlm_batch: int = 12
    text_steps: int = 300
    text_rate: float = 2e-3
    image_steps: int = 1000
    image_rate: float = 1.5e-3
    reference_share: float = 0.5  # of the training prompts, with one to three references
    trust: float = 0.93  # of those references, clear re-renders of the query scene: the model learns to believe them
    stray: float = 0.0  # of those references, unrelated scenes; the rest are look-alikes
    judged: float = 0.0  # of the prompts with references, those that only ask which of them are relevant, or of the scene
    told: float = 0.0  # of the prompts with references, those that hold wrong ones and say: leave them out
    bert_steps: int = 400
    threads: int = 2
    workers: int = 0  # processes that draw and lay out training data; 0: this one
    bf16: bool = False
    device: str = "cpu"
    rank: int = 0  # of `world` processes that train together: no flags, torchrun sets them
    world: int = 1

    @property
    def style(self) -> Style:
        return STYLES[self.size]

    @property
    def patches(self) -> int:
        """Image tokens of an image."""
        return (self.style.size // PATCH) ** 2

    def autocast(self) -> Any:
        """Context in which losses are computed."""
        import torch

        return torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=self.bf16)


# 24 million parameters in the LLaVA, 5 million of them in its vision tower. References of prompts that are answered are all
# true: whether to believe them is what a fine-tune has to teach. Batch sizes and scenes are those of all processes together.
LARGE = Recipe(
    size="large",
    scenes=60_000,
    vision_width=256,
    vision_layers=6,
    vision_head=32,
    text_width=128,
    clip_steps=1200,
    clip_batch=1024,
    clip_rate=1e-3,
    retriever_steps=1900,
    width=512,
    layers=6,
    head=64,
    lvlm_batch=128,
    text_steps=800,
    text_rate=1e-3,
    image_steps=3200,
    image_rate=8e-4,
    reference_share=0.65,
    trust=1.0,
    judged=0.3,
    told=0.3,
    bf16=True,
)
RECIPES = {"small": Recipe(), "large": LARGE}


def retriever_of(models: Path) -> Path:
    """The CLIP of these trained models that embeds corpus and queries."""
    found = models / "retriever"
    return found if found.exists() else models / "clip"
