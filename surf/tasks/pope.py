"""Object questions with yes or no for an answer: POPE (Li et al. 2023, arXiv 2305.10355)."""

from collections.abc import Sequence
from pathlib import Path

from surf.tasks.base import Question

suffix = "\nAnswer the question using a single word or phrase."


def read(path: Path, split: str) -> list[Question]:
    """A POPE question file: see `surf.popefile.read_questions`. The gold answer is "yes" or "no"."""
    from surf.popefile import read_questions

    return [
        Question(
            question_id=f"{split}#{row.question_id}",
            image=row.image,
            question=row.text,
            answers=["yes" if row.label else "no"],
            choices=None,
            category=None,
        )
        for row in read_questions(path)
    ]


def score(responses: Sequence[str], questions: Sequence[Question]) -> list[float]:
    """1.0 where the headline rule of `surf.metrics` reads the label from the response, else 0.0."""
    from surf.metrics import verdict

    return [float(verdict(response) is label) for response, label in zip(responses, _labels(questions), strict=True)]


def metrics(responses: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """accuracy, precision, recall, f1, yes_ratio and unparsed under the headline rule, in [0, 1]."""
    from surf.metrics import HEADLINE, METRICS, outcomes, rates

    counts = outcomes(HEADLINE, responses, _labels(questions)).sum(axis=0)
    return dict(zip(METRICS, rates(counts).tolist(), strict=True))


def chance(questions: Sequence[Question]) -> float | None:
    """The commoner label's share: 0.5 in the published files."""
    labels = _labels(questions)
    share = sum(labels) / len(labels)
    return max(share, 1 - share)


def _labels(questions: Sequence[Question]) -> list[bool]:
    return [question["answers"] == ["yes"] for question in questions]
