"""Multiple choice, as MMStar asks it: the response must name the right option, by its letter or by its text.

Source of the file format: the data set Lin-Chen/MMStar on the Hugging Face hub (Chen et al. 2024, arXiv 2403.20330).
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

from surf.errors import SurfError
from surf.tasks import files, packed
from surf.tasks.base import Question, by_category, mean

suffix = "\nAnswer with the option's letter from the given choices directly."


def read(path: Path, split: str) -> list[Question]:
    """MMStar: `mmstar.parquet` or `MMStar.tsv` with columns index, question, image, answer (a letter), category.

    Options stand in the question (`Options: A: …, B: …`) or in columns A, B, …, as in other files of VLMEvalKit; those are
    added to the question, one a line. Where no options can be read, `choices` is None and only letters score. The images are
    named as `surf.tasks.unpack` names them.

    Raises:
        SurfError: not such a file; a row without index, question or image; an answer that is no letter of an option.
    """
    return files.unique((place, _question(row, data, place, split)) for place, row, data in packed.rows(path))


def _question(row: files.Row, data: bytes, place: str, split: str) -> Question:
    question = files.text(row, "question", place).strip()
    choices = options(question) or None
    if choices is None and (choices := _columns(row)):
        question += "".join(f"\n{letter}. {text}" for letter, text in zip(ascii_uppercase, choices, strict=False))
    answer = files.text(row, "answer", place).strip().upper()
    if answer not in list(ascii_uppercase[: len(choices) if choices else 26]):
        letters = f"a letter from A to {ascii_uppercase[len(choices) - 1]}" if choices else "a letter"
        raise SurfError(f"answer is {files.short(row['answer'])}", where=place, expected=letters)
    return Question(
        question_id=f"{split}#{files.number(row, 'index', place)}",
        image=packed.name(data),
        question=question,
        answers=[answer],
        choices=choices,
        category=str(row["category"]) if row.get("category") else None,
    )


def _columns(row: files.Row) -> list[str] | None:
    """The texts of the columns A, B, … as far as they have one."""
    texts = [row.get(letter) for letter in ascii_uppercase]
    end = next(place for place, text in enumerate([*texts, None]) if not isinstance(text, str) or not text.strip())
    return [str(text) for text in texts[:end]] or None


def options(question: str) -> list[str]:
    """The options that stand in a question, as `Options: A: cat, B: dog` or `Choices:` with `(A) cat` on lines; or none."""
    heads = list(re.finditer(r"(?i)\b(?:options|choices)\s*:", question))
    if not heads:
        return []
    rest = question[heads[-1].end() :]
    marks: list[re.Match[str]] = []
    for letter in ascii_uppercase:  # in their order, so that a letter within an option is none
        mark = re.compile(rf"(?:^|[\s,;])(?:\({letter}\)|{letter}[.:)])\s*").search(rest, marks[-1].end() - 1 if marks else 0)
        if mark is None or (not marks and rest[: mark.start()].strip()):
            break
        marks.append(mark)
    if len(marks) < 2:
        return []
    ends = [mark.start() for mark in marks[1:]] + [len(rest)]
    return [rest[mark.end() : end].strip().rstrip(",;").strip() for mark, end in zip(marks, ends, strict=True)]


def score(responses: Sequence[str], questions: Sequence[Question]) -> list[float]:
    """1.0 where the response names the right option and no other, else 0.0."""
    return [
        float(chosen(response, question["choices"]) == question["answers"][0])
        for response, question in zip(responses, questions, strict=True)
    ]


def metrics(responses: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """accuracy, `accuracy (CATEGORY)`, and unparsed (responses that name no option or several), all in [0, 1]."""
    lost = [float(chosen(text, row["choices"]) is None) for text, row in zip(responses, questions, strict=True)]
    return by_category(score(responses, questions), questions) | {"unparsed": mean(lost)}


def chance(questions: Sequence[Question]) -> float | None:
    """What the best single letter scores: the commonest answer's share."""
    letters = Counter(question["answers"][0] for question in questions)
    return max(letters.values()) / len(questions) if letters else None


def chosen(response: str, choices: Sequence[str] | None) -> str | None:
    """The letter of the option that a response names, or None for none or several.

    The text of one option, of several words, names it: "Vitamin A." is no letter. Else a letter counts where
    `surf.metrics.letter` reads one, never inside a word; otherwise the option whose text the response contains.
    """
    from surf.metrics import letter

    said = _plain(response)
    alike = [place for place, text in enumerate(choices or ()) if " " in said and _plain(text) == said]
    if len(alike) == 1:
        return ascii_uppercase[alike[0]]
    found = letter(response)
    if choices is None or (found is not None and found in ascii_uppercase[: len(choices)]):
        return found
    place = named(response, choices)
    return None if place is None else ascii_uppercase[place]


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(" .")


def named(response: str, names: Sequence[str]) -> int | None:
    """Which of several names a response is or contains, as whole words; None for none or several.

    "dining table" is no "table": a name within another one that is found does not count. A response that negates or hedges
    ("not a cat", "cat or dog") names nothing.
    """
    from surf.metrics import short_match, words

    said = words(response)
    whole = [place for place, name in enumerate(names) if said and words(name) == said]
    if whole:
        return whole[0] if len(whole) == 1 else None
    found = {place: f" {' '.join(words(name))} " for place, name in enumerate(names) if short_match(response, name)}
    longest = [place for place, name in found.items() if not any(name in other and name != other for other in found.values())]
    return longest[0] if len(longest) == 1 else None
