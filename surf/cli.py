"""Command lines of the stages: flags named like the keys of config.yaml, and paths."""

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from surf.config import SECTIONS, explain
from surf.errors import SurfError
from surf.sections import Section

log = logging.getLogger("surf")
T = TypeVar("T")


def parse(
    argv: Sequence[str] | None,
    *,
    prog: str,
    about: str,
    sections: Sequence[str] = (),
    paths: Sequence[str] = (),
    extras: dict[str, dict[str, Any]] | None = None,
) -> argparse.Namespace:
    """Read a stage's command line.

    Args:
        sections: names of config sections; each comes back as a frozen section object under that name.
        paths: required path flags; each comes back as a `Path`.
        extras: further flags, name to `add_argument` keywords.

    Raises:
        SurfError: a value does not fit its key.
    """
    parser = argparse.ArgumentParser(prog=f"python -m surf.{prog}", description=about, allow_abbrev=False)
    for name in paths:
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, type=Path, required=True)
    for name, options in (extras or {}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, **options)
    for name in sections:
        group = parser.add_argument_group(name, SECTIONS[name].__doc__)
        for key, field in SECTIONS[name].model_fields.items():
            group.add_argument(f"--{name}.{key}", metavar="VALUE", help=(field.description or "").replace("%", "%%"))
    values = vars(parser.parse_args(argv))
    for name in sections:
        values[name] = _section(name, {key: values.pop(f"{name}.{key}") for key in SECTIONS[name].model_fields})
    return argparse.Namespace(**values)


def flags(**sections: Section) -> str:
    """The keys that change results, as command-line flags: `--answer.temperature=0.0`.

    Together with `knobs` they say all there is to know, so the printed command can be pasted into a shell;
    `parse` reads them back.
    """
    return _render(sections, None)


def knobs(**sections: Section) -> str:
    """The keys that change speed and places only, as command-line flags. They are kept apart so that they rerun nothing."""
    return _render(sections, "knob")


def _render(sections: dict[str, Section], role: str | None) -> str:
    words = []
    for name, section in sections.items():
        values = section.model_dump(mode="json")
        for key, field in type(section).model_fields.items():
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            if extra.get("role") == role:
                value = values[key] if isinstance(values[key], str) else json.dumps(values[key])
                words.append(f"--{name}.{key}={value}")
    return shlex.join(words)


def run(main: Callable[[], None]) -> None:
    """Run a stage: progress to stderr, a user's mistake as one paragraph and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for noisy in ("httpx", "huggingface_hub", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        main()
    except SurfError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def dispatch(
    commands: dict[str, Callable[[Sequence[str]], None]], argv: Sequence[str] | None, *, prog: str, about: str
) -> None:
    """Run the command that the first word names.

    Raises:
        SurfError: there is none, or no such one.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["-h"], ["--help"]):
        print(about)
        return
    if not words or words[0] not in commands:
        found = f"there is no {words[0]!r}" if words else "what to do is missing"
        raise SurfError(found, where=f"python -m surf.{prog}", expected=f"one of {', '.join(commands)}")
    commands[words[0]](words[1:])


def chunks(items: Sequence[T], size: int, *, desc: str, unit: str = "row") -> Iterator[Sequence[T]]:
    """`items` in slices of `size`, with a progress bar that shows rate and ETA.

    A slice counts when the next one is asked for. On a terminal the bar moves twice a second, in a log every ten seconds.
    """
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(total=len(items), desc=desc, unit=f" {unit}s", mininterval=interval, dynamic_ncols=True) as bar:
        for start in range(0, len(items), size):
            chunk = items[start : start + size]
            yield chunk
            bar.update(len(chunk))


def _section(name: str, given: dict[str, str | None]) -> Any:
    section = SECTIONS[name]
    values = {key: _value(text, section, key) for key, text in given.items() if text is not None}
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise SurfError(f"{name}.{explain(error)}", where="command line") from None


def _value(text: str, section: Any, key: str) -> Any:
    """Strings stand as they are, everything else is JSON; a field that takes both prefers JSON's null."""
    annotation = section.model_fields[key].annotation
    if annotation is str or (annotation == str | None and text != "null"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
