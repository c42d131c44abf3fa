"""Short answers to open questions: VizWiz."""

from collections.abc import Sequence
from pathlib import Path

from surf.tasks.base import Question

suffix = "\\nAnswer the question using a single word or phrase."


def read(path: Path, split: str) -> list[Question]:
    """Not written yet."""
    raise NotImplementedError


def score(responses: Sequence[str], questions: Sequence[Question]) -> list[float]:
    """Not written yet."""
    raise NotImplementedError


def metrics(responses: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """Not written yet."""
    raise NotImplementedError


def chance(questions: Sequence[Question]) -> float | None:
    """Not written yet."""
    raise NotImplementedError
