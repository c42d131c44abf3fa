"""Reading public POPE files: question files, and answer files as other projects publish them."""

from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import orjson

from surf.errors import SurfError
from surf.images import identity

# Where published files keep the answer, best first. LLaVA and SURf: text; POPE itself: answer; VLMEvalKit: prediction
# (its `answer` is the label).
_ANSWER_KEYS = ("prediction", "text", "answer")
_SHOWN = 5  # ids named in an error message


class Question(NamedTuple):
    """One row of a POPE question file."""

    question_id: str
    image: str
    text: str
    label: bool


def read_questions(path: Path) -> list[Question]:
    """A POPE question file: JSON lines, or a JSON list, of {question_id, image, text, label}.

    Raises:
        SurfError: no such file, no questions, a bad line, a missing key, an odd label, an id that stands twice.
    """
    questions: dict[str, Question] = {}
    for place, row in _rows(path, "POPE questions"):
        label = _text(row, "label", place).strip().lower()
        if label not in ("yes", "no"):
            raise SurfError(f"label is {row['label']!r}", where=place, expected='"yes" or "no"')
        question = Question(_id(row, place), _text(row, "image", place), _text(row, "text", place), label == "yes")
        if question.question_id in questions:
            raise SurfError(f"question_id {question.question_id} stands twice", where=place, expected="each id once")
        questions[question.question_id] = question
    return list(questions.values())


def read_answers(path: Path, questions: list[Question]) -> list[str]:
    """Answers of a published file, in the order of `questions`; joined by id, never by order.

    The file holds JSON lines, or a JSON list, of question_id and the answer under text, answer or prediction. Where a row
    carries the question (prompt, question, or text beside an answer) or the image, they must be those of the id.

    Raises:
        SurfError: a bad line, a question in place of an answer, an unknown, missing or repeated id, another question or image
            under an id.
    """
    known = {question.question_id: question for question in questions}
    answers: dict[str, str] = {}
    for place, row in _rows(path, "answers to POPE questions"):
        key = _id(row, place)
        if key not in known:
            raise SurfError(f"question_id {key} is not in the question file", where=place, next="check --questions")
        if key in answers:
            raise SurfError(f"question_id {key} stands twice", where=place, expected="one answer to each question")
        _same_question(row, known[key], place)
        answers[key] = _answer(row, known[key], place)
    missing = [key for key in known if key not in answers]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
        raise SurfError(
            f"{len(missing)} of {len(known)} questions have no answer: question_id {shown}",
            where=str(path),
            expected="an answer to every question",
            next="check that --questions and --answers belong to the same split",
        )
    return [answers[question.question_id] for question in questions]


def _same_question(row: dict[str, Any], question: Question, place: str) -> None:
    for key in ("prompt", "question"):
        if isinstance(row.get(key), str) and _plain(question.text) not in _plain(row[key]):
            raise SurfError(
                f"{key} is {_short(row[key])} under question_id {question.question_id}",
                where=place,
                expected=f"the question {question.text!r}",
                next="check that --questions and --answers belong to the same split",
            )
    image = row.get("image")
    if isinstance(image, str) and PurePosixPath(image).name != PurePosixPath(question.image).name:
        if identity(image) == identity(question.image):  # one COCO photograph under two names
            return
        raise SurfError(
            f"image is {_short(image)} under question_id {question.question_id}",
            where=place,
            expected=f"the image {question.image!r}",
            next="check that --questions and --answers belong to the same split",
        )


def _answer(row: dict[str, Any], question: Question, place: str) -> str:
    keys = [key for key in _ANSWER_KEYS if key in row]
    if not keys:
        raise SurfError("has no answer", where=place, expected="a key text, answer or prediction")
    if keys == ["text"]:
        answer = _text(row, "text", place, empty=True)
        if "label" in row or _plain(answer) == _plain(question.text):
            raise SurfError(
                f"looks like a question, and has no answer: text is {_short(answer)}",
                where=place,
                expected="an answer under answer or prediction, or under text in a row without label",
                next="check that --answers is not a question file",
            )
        return answer
    best = next(key for key in keys if key != "text")
    if "text" in row and _plain(question.text) not in _plain(_text(row, "text", place, empty=True)):
        # beside an answer, as in a question file with answers added, text is the question
        raise SurfError(
            f"has both text and {best}, and text is {_short(row['text'])}",
            where=place,
            expected=f"the answer under one of them, or the question {question.text!r} under text",
            next="check that --questions and --answers belong to the same split",
        )
    return _text(row, best, place, empty=True)


def _plain(text: str) -> str:
    """A question without what may differ between two copies: case, blanks, and the older files' "imange"."""
    return " ".join(text.lower().replace("imange", "image").split())


def _rows(path: Path, what: str) -> list[tuple[str, dict[str, Any]]]:
    """(place for error messages, row) of a file of JSON lines, or of one JSON list, whatever its suffix."""
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").strip()
    except OSError as error:
        raise SurfError(f"cannot be read ({error.strerror})", where=str(path), expected=f"a file of {what}") from None
    rows: list[tuple[str, Any]]
    if content.startswith(b"["):
        rows = [(f"{path}, row {number}", row) for number, row in enumerate(_json(content, str(path)), 1)]
    else:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        places = [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
        rows = [(place, _json(line, place)) for place, line in places]
    for place, row in rows:
        if not isinstance(row, dict):
            raise SurfError(f"is {_short(row)}", where=place, expected="a JSON object")
    if not rows:
        raise SurfError("is empty", where=str(path), expected=f"a file of {what}, one JSON object a line")
    return rows


def _json(text: bytes, place: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise SurfError(f"is no JSON ({error})", where=place, expected="one JSON object a line, in UTF-8") from None


def _id(row: dict[str, Any], place: str) -> str:
    value = row.get("question_id")
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        found = f"question_id is {value!r}" if "question_id" in row else "has no question_id"
        raise SurfError(found, where=place, expected="a number or a string")
    return str(value)


def _text(row: dict[str, Any], key: str, place: str, *, empty: bool = False) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not (empty or value.strip()):
        found = f"{key} is {_short(value)}" if key in row else f"has no {key}"
        raise SurfError(found, where=place, expected=f"a text under {key!r}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
