"""Short answers to open questions, as VizWiz asks them, scored by the VQA accuracy.

Source of the file format: vizwiz.org, task "visual question answering" (Gurari et al. 2018, arXiv 1802.08218). Source of the
accuracy and of the normalisation: visualqa.org/evaluation (Antol et al. 2015, arXiv 1505.00468).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from surf.errors import SurfError
from surf.tasks import files
from surf.tasks.base import Question, by_category, mean

# LLaVA-1.5 asks VizWiz so; other short-answer files go without the first line.
suffix = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    "\nAnswer the question using a single word or phrase."
)


def read(path: Path, split: str) -> list[Question]:
    """VizWiz VQA: a JSON list of {image, question, answers: [{answer, answer_confidence}, …], answer_type, answerable}.

    VizWiz asks one question about an image, so the image's name is the id; a file of several questions about an image
    carries question_id. An answer may also be a plain text. The category is the answer_type.

    Raises:
        SurfError: a row without image, question or answers; an id that stands twice.
    """
    return files.unique(
        (place, _question(row, place, split)) for place, row in files.items(files.load(path, _EXPECTED), str(path), _EXPECTED)
    )


_EXPECTED = "a JSON list of {image, question, answers}"


def _question(row: files.Row, place: str, split: str) -> Question:
    if "answers" not in row:
        raise SurfError(
            "has no answers", where=place, expected="gold answers", next="take val.json: those of test are not public"
        )
    image = files.text(row, "image", place)
    key = files.number(row, "question_id", place) if "question_id" in row else PurePosixPath(image).stem
    answers = [
        entry if isinstance(entry, str) else files.text(entry, "answer", where, empty=True)
        for where, entry in files.items(row["answers"], f"{place}, answers", "a list of {answer}", (str, dict))
    ]
    return Question(
        question_id=f"{split}#{key}",
        image=image,
        question=files.text(row, "question", place),
        answers=answers,
        choices=None,
        category=str(row["answer_type"]) if row.get("answer_type") else None,
    )


def score(responses: Sequence[str], questions: Sequence[Question]) -> list[float]:
    """VQA accuracy of each response: min(others that gave this answer / 3, 1), averaged over leaving each annotator out.

    Responses and gold answers are normalised alike. A question with a single gold answer scores 1 or 0.
    """
    return [
        _accuracy(Counter(map(_compared, question["answers"])), _compared(response))
        for response, question in zip(responses, questions, strict=True)
    ]


def metrics(responses: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """accuracy (the mean VQA accuracy) and `accuracy (ANSWER TYPE)`, all in [0, 1]; papers print per cent."""
    return by_category(score(responses, questions), questions)


def chance(questions: Sequence[Question]) -> float | None:
    """What the best single answer to all questions scores; on VizWiz that is "unanswerable"."""
    totals: defaultdict[str, float] = defaultdict(float)
    for question in questions:
        gold = Counter(map(_compared, question["answers"]))
        for answer in gold:
            totals[answer] += _accuracy(gold, answer)
    return max(totals.values()) / len(questions) if totals else None


def _compared(text: str) -> str:
    """`normalised`; of a text of which nothing is left ("A", "?") more stays, else an empty response would be equal to it."""
    return normalised(text) or " ".join(_words(text)) or text.strip()


def _accuracy(gold: Counter[str], answer: str) -> float:
    said, total = gold[answer], gold.total()
    if total == 1:
        return float(said)
    # leaving out one of the `said` annotators leaves one fewer; leaving out another one leaves all of them
    return mean([min((said - 1) / 3, 1.0)] * said + [min(said / 3, 1.0)] * (total - said))


# --- normalisation ----------------------------------------------------------------------------------------------------

_MARKS = ';/[]"{}()=+\\_-><@`,?!'  # all punctuation but apostrophe, colon and full stop
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {word: str(value) for value, word in enumerate(["zero", "one", "two", "three", "four", "five", "six"])}
_NUMBERS |= {"none": "0", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
# Contractions that lost their apostrophe: a subject and an ending, or a verb and n't. Words of their own (its, were, well,
# ill, shell, id, wed, lets) are left alone, as the evaluation does.
_ENDINGS = {
    "d": "he how it someone something there they where who you",
    "ll": "how it somebody someone something they what who why you",
    "m": "",
    "re": "there they what why you",
    "s": "he how somebody someone that there what when where who why",
    "ve": "could might must not should they we what where who would you",
    "nt": "are ca could did does do had has have is might must need ought sha should was were wo would",
}


def normalised(text: str) -> str:
    """An answer as the VQA evaluation compares it.

    Lower case; full stops go unless they stand before a digit; other marks become blanks, or go where one of their kind
    touches a blank or a comma stands between digits; number words up to ten become digits; articles go; contractions get
    their apostrophe back.
    """
    return " ".join(_CONTRACTIONS.get(word, word) for word in _words(text) if word not in _ARTICLES)


def _words(text: str) -> list[str]:
    text = bare = " ".join(text.replace("’", "'").split())
    grouped = re.search(r"\d,\d", text) is not None
    for mark in _MARKS:
        glued = grouped or f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if glued else " ")
    words = re.sub(r"\.(?!\d)", "", bare).lower().split()
    return [_NUMBERS.get(word, word) for word in words]


def _contractions() -> dict[str, str]:
    table = {"aint": "ain't", "maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all"}
    for ending, stems in _ENDINGS.items():
        apostrophe = "n't" if ending == "nt" else f"'{ending}"
        for stem in stems.split():
            table[stem + ending] = stem + apostrophe
    return table


_CONTRACTIONS = _contractions()
