"""Public JSON files, read with a place to name in every error."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from surf.errors import SurfError
from surf.tasks.base import Question

Row = dict[str, Any]


def load(path: Path, expected: str) -> Any:
    """The content of a JSON file. Raises SurfError: it cannot be read, or is no JSON."""
    import orjson

    try:
        return orjson.loads(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except OSError as error:
        raise SurfError(f"cannot be read ({error.strerror})", where=str(path), expected=expected) from None
    except orjson.JSONDecodeError as error:
        raise SurfError(f"is no JSON ({error})", where=str(path), expected=expected) from None


def items(values: Any, where: str, expected: str, kinds: type | tuple[type, ...] = dict) -> list[tuple[str, Any]]:
    """(place, item) of a JSON list that holds items of some kinds, counted from 1."""
    if not isinstance(values, list) or not values:
        raise SurfError("holds no rows" if values == [] else f"holds {short(values)}", where=where, expected=expected)
    for number, value in enumerate(values, 1):
        if not isinstance(value, kinds):
            raise SurfError(f"is {short(value)}", where=f"{where}, row {number}", expected=expected)
    return [(f"{where}, row {number}", value) for number, value in enumerate(values, 1)]


def text(row: Row, key: str, place: str, *, empty: bool = False) -> str:
    """The text under a key. Raises SurfError: there is none, or it is empty and must not be."""
    value = row.get(key)
    if not isinstance(value, str) or not (empty or value.strip()):
        found = f"{key} is {short(value)}" if key in row else f"has no {key}"
        raise SurfError(found, where=place, expected=f"a text under {key!r}")
    return value


def number(row: Row, key: str, place: str) -> int | str:
    """The id under a key: a whole number or a text."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        found = f"{key} is {short(value)}" if key in row else f"has no {key}"
        raise SurfError(found, where=place, expected=f"a number or a text under {key!r}")
    return value


def unique(questions: Iterable[tuple[str, Question]]) -> list[Question]:
    """The questions alone. Raises SurfError: an id stands twice; the place of the second one is named."""
    seen: dict[str, Question] = {}
    for place, question in questions:
        key = question["question_id"]
        if key in seen:
            raise SurfError(f"question_id {key.partition('#')[2]} stands twice", where=place, expected="each id once")
        seen[key] = question
    return list(seen.values())


def short(value: Any) -> str:
    """A value as an error message shows it."""
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def reason(error: Exception) -> str:
    """What a library says, without the long rows that it quotes."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
