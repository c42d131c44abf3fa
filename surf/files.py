"""Reading and writing small files. A file appears under its name only when it is whole."""

import json
import os
import re
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surf.errors import SurfError

_TEMPORARY = re.compile(r"\..+\.(\d+)\.[0-9a-f]{8}\.tmp")  # as `replacing` names them; the group is the process


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, unique to this process, that takes the place of `path` at the end.

    Two writers of one file cannot tear it: the later rename wins, whole. On an error nothing remains; what writers of `path`
    left that were killed on this machine is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for stray in path.parent.glob(f".{path.name}.*.tmp"):
        if writer_is_gone(stray):
            stray.unlink(missing_ok=True)


def writer_is_gone(temporary: Path, *, elsewhere: bool = False) -> bool:
    """Whether the process in a temporary file's name is dead; `elsewhere` is the answer for processes of other machines."""
    match = _TEMPORARY.fullmatch(temporary.name)
    if not match:
        return False
    if f".{socket.gethostname()}.{match[1]}." not in temporary.name:
        return elsewhere
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # alive, another user's
        return False
    return False


def write_text(path: Path, text: str) -> None:
    """Write a small text file, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys and no time stamps, so that equal content gives equal bytes."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def write_json_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSON list, one row a line, keys in their given order."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_text(path, f"[\n{lines}\n]\n")


def read_json(path: Path, *, expected: str = "a JSON file", next: str = "") -> Any:
    """Read a JSON file that a user may have supplied; any fault becomes a `SurfError`."""
    import orjson

    try:
        return orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise SurfError("there is no such file", where=str(path), expected=expected, next=next) from None
    except (OSError, orjson.JSONDecodeError) as error:
        raise SurfError(f"cannot be read ({error})", where=str(path), expected=expected, next=next) from None


def read_rows(path: Path, expected: str) -> list[Any]:
    """Read a JSON file that must hold a list with at least one row; `expected` says of what, and which key names the file."""
    try:
        rows = read_json(path, expected=expected)
    except SurfError as error:
        if "unexpected content after document" not in error.what:
            raise
        raise SurfError(
            "looks like JSON lines, which are not read here",
            where=str(path),
            expected=expected,
            next=f"jq -s . {path} > {path.stem}.list.json, and name that file in the config",
        ) from None
    if not isinstance(rows, list) or not rows:
        raise SurfError("holds no rows", where=str(path), expected=expected)
    return rows
