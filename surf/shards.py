"""Names of shards and which shard a row belongs to. Nothing here opens a file."""

import hashlib
import re

from surf.errors import SurfError

PART = re.compile(r"part-(\d{5})-of-(\d{5})")


def part_name(index: int, count: int) -> str:
    """Name of shard `index` (0-based) of `count`, without suffix: `part-00007-of-00050`."""
    return f"part-{index:05d}-of-{count:05d}"


def part_names(count: int) -> list[str]:
    """All `count` shard names, in order."""
    return [part_name(index, count) for index in range(count)]


def parse_part(name: str) -> tuple[int, int]:
    """(index, count) of a shard name; raises SurfError for any other string."""
    match = PART.fullmatch(name)
    if not match or int(match[1]) >= int(match[2]):
        raise SurfError(f"{name!r} is not a shard name", expected="a name like part-00007-of-00050")
    return int(match[1]), int(match[2])


def row_range(rows: int, index: int, count: int) -> range:
    """Contiguous, balanced rows of shard `index`: sizes differ by at most one."""
    return range(rows * index // count, rows * (index + 1) // count)


def stable_hash(*parts: object) -> int:
    """64-bit hash that is the same in every process and on every machine (Python's own is salted)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def shard_of(key: str, count: int) -> int:
    """Shard of a row that is spread by key; all rows of one key meet in one shard."""
    return stable_hash(key) % count
