"""The plan as a table, and its numbers for people."""

from typing import TYPE_CHECKING, Any

from surf import tables

if TYPE_CHECKING:
    from surf.plan import Plan


def table(planned: "Plan", gpus: int) -> str:
    """As Markdown, for the terminal too."""
    head = ["stage", "rows", "jobs", "a job", "GPU-hours", "wall", "disk", "rates from"]
    body = [
        [
            line.stage,
            f"{line.rows:,}" if line.rows else "",
            f"{line.jobs:,}",
            time(line.job_seconds),
            "" if line.gpu_hours is None else number(line.gpu_hours),
            time(line.wall_seconds),
            size(line.disk_bytes) if line.disk_bytes else "",
            line.source,
        ]
        for line in planned.lines
    ]
    lines = [tables.table(head, body, right=range(1, 7), padded=True), ""]
    if planned.wall_seconds and planned.gpu_hours:
        low, middle, high = planned.wall_seconds
        lines.append(f"Wall time with {gpus} GPUs at a time: {time(middle)} (90 % between {time(low)} and {time(high)})")
        low, middle, high = planned.gpu_hours
        lines.append(f"GPU-hours: {number(middle)} (90 % between {number(low)} and {number(high)})")
    lines.append(f"Disk: {size(planned.disk_bytes)} at most")
    if planned.unknown and planned.wall_seconds is None:
        lines.append("Times need rates, which `python -m surf.calibrate` measures")
    elif planned.unknown:
        lines.append(f"Without a rate, and so not in these times: {', '.join(planned.unknown)}")
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def time(seconds: float | None) -> str:
    """Seconds for people; empty for None."""
    if seconds is None:
        return ""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    if seconds < 9.95 * 60:
        return f"{seconds / 60:.1f} min"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def number(value: float) -> str:
    """Two digits, or whole numbers from 100 on."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.2g}"


def as_json(planned: "Plan", gpus: int) -> dict[str, Any]:
    """The plan for programs: the same numbers, in seconds, hours and bytes; bands are [5th percentile, typical, 95th]."""
    return {**planned._asdict(), "gpus": gpus, "lines": [line._asdict() for line in planned.lines]}
