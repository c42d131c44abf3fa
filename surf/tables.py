"""What all tables and plots share: Markdown, a number with its interval, an SVG with stable bytes."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from surf import store
from surf.intervals import Estimate


def line(cells: Iterable[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[int] = (), padded: bool = False) -> str:
    """A Markdown table.

    Args:
        right: columns that are aligned to the right.
        padded: cells are filled up with blanks, so that it is a table on a terminal too.
    """
    lines = [list(head), ["---:" if column in right else "---" for column in range(len(head))], *map(list, rows)]
    if padded:
        columns = []
        for number, column in enumerate(zip(*lines, strict=True)):
            width = max(map(len, column))
            side = str.rjust if number in right else str.ljust
            columns.append([side(cell, width) for cell in column])
            columns[-1][1] = column[1].replace("---", "-" * (width - column[1].count(":")))
        lines = [list(row) for row in zip(*columns, strict=True)]
    return "\n".join(map(line, lines))


def percent(value: Estimate, *, sign: bool = False) -> str:
    """87.9 (86.7 to 89.1)"""
    form = "+.1f" if sign else ".1f"
    text = format(100 * value.value, form)
    if value.low is None or value.high is None:
        return text
    return f"{text} ({format(100 * value.low, form)} to {format(100 * value.high, form)})"


def save(canvas: Any, path: Path) -> None:
    """Write a matplotlib canvas as SVG; equal drawings, equal bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "surf", "svg.fonttype": "none"}), store.replacing(path) as temporary:
        canvas.figure.savefig(temporary, format="svg", metadata={"Date": None})
