"""What every evaluation task offers, and what a question is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypedDict


class Question(TypedDict):
    """One question of an evaluation, whatever file it comes from."""

    question_id: str  # split#id, so that ids are unique over the splits of a task
    image: str  # name, as `surf.images.Images` opens it
    question: str  # without the suffix
    answers: list[str]  # all gold answers as the file gives them; of a choice the letters, of a classification the class
    choices: list[str] | None  # texts of options A, B, …, or all classes; None for open questions
    category: str | None  # what the file sorts its questions by


class Task(Protocol):
    """A kind of evaluation. Its module implements it: surf/tasks/vqa.py is `KINDS["vqa"]`."""

    suffix: str  # what is appended to every question by default, with its leading line break

    def read(self, path: Path, split: str) -> list[Question]:
        """Questions of one public file (or folder), in the file's order.

        Raises:
            SurfError: names file, row and key of whatever does not fit the format.
        """
        ...

    def score(self, responses: Sequence[str], questions: Sequence[Question]) -> list[float]:
        """What each response is worth, in [0, 1]: [questions]."""
        ...

    def metrics(self, responses: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
        """Numbers of the whole, under their usual names; the module says on which scale."""
        ...

    def chance(self, questions: Sequence[Question]) -> float | None:
        """Mean score of a guess that sees neither image nor question, in [0, 1]; None where guessing has no meaning."""
        ...


def mean(values: Sequence[float]) -> float:
    """The mean, 0.0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def by_category(scores: Sequence[float], questions: Sequence[Question]) -> dict[str, float]:
    """accuracy, and `accuracy (CATEGORY)` of each category where the file gives some."""
    parts: dict[str, list[float]] = {}
    for value, question in zip(scores, questions, strict=True):
        if question["category"] is not None:
            parts.setdefault(question["category"], []).append(value)
    return {"accuracy": mean(scores)} | {f"accuracy ({name})": mean(part) for name, part in sorted(parts.items())}
