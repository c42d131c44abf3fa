"""Command lines of the stages: flags named like the keys of config.yaml, and paths."""

import argparse
import errno
import json
import logging
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from surf.config import SECTIONS, explain
from surf.errors import SurfError
from surf.sections import Section

log = logging.getLogger("surf")
T = TypeVar("T")
BEGINS = "begins on"  # stands in the first line of every attempt; logs are appended to
SLICE_SECONDS = 120.0  # work between two saves, at most
FIRST_SLICE = 32  # items; how fast a stage is, nobody knows before
FIRST_ON_GPU = 256  # the same with a GPU, on which small batches waste more than they tell


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
    """Run a stage: progress to stderr, a user's mistake as one paragraph and exit code 2.

    SIGTERM and SIGUSR1 end it as soon as the rows at work are saved, Ctrl-C at once; the exit code is 128 + the signal's
    number. What is saved stays, and what is not is made again: so SIGKILL or a power cut cost a few rows more, and no other.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for noisy in ("httpx", "huggingface_hub", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a shell's background job
            signal.signal(number, _asked_to_end)
    try:
        if os.environ.get("RANK", "0") == "0":  # one voice of those that train together
            log.info("%s %s %s, process %d", Path(sys.argv[0]).stem, BEGINS, socket.gethostname(), os.getpid())
        main()
    except SurfError as error:
        _fail(str(error), 2)
    except Stopped as stopped:
        name = signal.Signals(int(stopped.code or 0) - 128).name
        _fail(f"stopped by {name}; what was saved is kept; next: the same command goes on from there", stopped.code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}the disk is full ({error}); next: free some space, then the same command goes on from what is saved", 1)


class Stopped(SystemExit):
    """A signal asked this stage to end."""


_asked: list[int] = []  # signals that came
_slicing = False  # inside `chunks`: rows are at work that will be saved soon


def _asked_to_end(number: int, _frame: object) -> None:
    _asked.append(number)
    if number == signal.SIGINT or not _slicing:
        raise Stopped(128 + number)


def _fail(message: str, code: Any) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


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
    """`items` in slices of at most `size`, each to be saved at its end, with a progress bar that shows rate and ETA.

    The first slice is short; lengths grow fourfold up to `size`, and halve after a slice that took longer than `SLICE_SECONDS`:
    however slow the model, a kill loses minutes. A stage that is fast enough cuts its rows alike in every run. A slice counts
    when the next one is asked for. On a terminal the bar moves twice a second, in a log every ten seconds.

    Raises:
        Stopped: SIGTERM or SIGUSR1 came; the slices so far are saved.
    """
    global _slicing
    torch = sys.modules.get("torch")
    length, start = min(size, FIRST_ON_GPU if torch is not None and torch.cuda.is_available() else FIRST_SLICE), 0
    with progress(len(items), desc=desc, unit=unit) as bar:
        _slicing = True
        try:
            while start < len(items):
                stop_if_asked()
                begun = time.monotonic()
                chunk = items[start : start + length]
                yield chunk
                bar.update(len(chunk))
                start += len(chunk)
                spent = time.monotonic() - begun
                if spent > SLICE_SECONDS:
                    length = max(1, length // 2)
                else:
                    length = min(size, length * max(1, min(4, int(SLICE_SECONDS / max(spent, 1e-9)))))
        finally:
            _slicing = False


def stop_if_asked() -> None:
    """End here if a signal asked for it; to be called inside `chunks`, when all rows at work are saved or soon will be.

    Raises:
        Stopped: SIGTERM or SIGUSR1 came.
    """
    if _asked:
        raise Stopped(128 + _asked[0])


def progress(total: int, *, desc: str, unit: str) -> Any:
    """A progress bar (tqdm): twice a second on a terminal, every ten seconds in a log."""
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=desc, unit=f" {unit}s", mininterval=interval, dynamic_ncols=True)


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
