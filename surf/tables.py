"""What all result tables and plots share: a Markdown line, a number with its interval, an SVG with stable bytes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from surf import store
from surf.intervals import Estimate


def line(cells: Iterable[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


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
