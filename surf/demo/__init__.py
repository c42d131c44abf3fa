"""The embedded world: images, captions, questions and tiny models, so that the pipeline runs without a download."""

from __future__ import annotations

from pathlib import Path

MODELS = Path(__file__).parent / "models"  # clip/ (open_clip), lvlm/ and bert/ (transformers)
