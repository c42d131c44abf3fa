"""Is every image there and readable? Looks at the first and the last bytes only: thousands of images a second and core.

The short cut may only say "fine": an image that it doubts is decoded by `surf.images`, whose word is final. So nothing is
called bad that the stages could read; what it cannot see is a fault in the middle of a file.
"""

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from surf.errors import ImageError
from surf.images import Images, too_large

HEADS = (16_384, 262_144)  # bytes read from the beginning; the second only where a header is longer (large EXIF, ICC)
_TASK = 512  # images that one process takes at a time
_FEW = 4096  # up to here one process is faster than starting several
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # ITU-T T.81 B.1.1.3 (EOI); PNG specification 11.2.5


class Seen(NamedTuple):
    """What `look` found: errors by image name, and difference hashes (64 bits) by name if they were asked for."""

    errors: dict[str, str]
    hashes: dict[str, int]


class _Task(NamedTuple):
    """Images of one root for one process; `group` and `rows` say where they stand in a Parquet file."""

    root: str
    names: Sequence[str]
    group: int = -1
    rows: Sequence[int] = ()


def look(names: Sequence[str], roots: Sequence[str], max_pixels: int, *, processes: int = 1, hashes: bool = False) -> Seen:
    """Look at every image, in parallel, with a progress bar that shows rate and ETA.

    Args:
        names: image names, each once.
        roots, max_pixels: as in the config; the first root that holds a name wins.
        hashes: also decode each image at about 1/8 of its size and hash it (see `difference_hash`); much slower.

    Raises:
        SurfError: a root is neither a folder nor a Parquet file with the columns image and bytes.
    """
    from tqdm import tqdm

    seen = Seen({}, {})
    left = list(names)
    interval = 0.5 if sys.stderr.isatty() else 10.0
    bar = tqdm(
        total=len(left), desc="images", unit=" images", mininterval=interval, dynamic_ncols=True, disable=len(left) <= _FEW
    )
    pool = None
    if processes > 1 and len(left) > _FEW:
        # Fresh interpreters: open Parquet files and their threads do not survive a fork.
        pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    try:
        for root in roots:
            tasks, elsewhere = _tasks(root, left, max_pixels)
            missing: list[str] = elsewhere
            work = [(task, max_pixels, hashes) for task in tasks]
            for result in pool.map(_look, work) if pool else map(_look, work):
                missing += result[0]
                seen.errors.update(result[1])
                seen.hashes.update(result[2])
                bar.update(result[3])
            left = missing
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
        bar.update(len(left))
        bar.close()
    seen.errors.update(dict.fromkeys(left, "there is no such image in the image roots"))
    return seen


def difference_hash(image: Any) -> int:
    """64 bits of an image: is each of 8 x 8 grey cells brighter than its right neighbour? Copies differ in a few bits only.

    The usual difference hash (N. Krawetz, "Kind of Like That", 2013); the first cell is the highest bit.
    """
    import numpy as np
    from PIL import Image

    cells = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))
    return int.from_bytes(np.packbits(cells[:, :-1] > cells[:, 1:]).tobytes(), "big")


def small(data: bytes, size: tuple[int, int] = (36, 32)) -> Any:
    """The grey image, decoded at the smallest of JPEG's scales (down to 1/8) that is not below `size` (pixels)."""
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    image.draft("L", size)
    return image.convert("L")


# --- in the processes -------------------------------------------------------------------------------------------------


def _tasks(root: str, names: Sequence[str], max_pixels: int) -> tuple[list[_Task], list[str]]:
    """The work on one root, and the names that it certainly does not hold."""
    if Path(root).is_dir():
        return [_Task(root, names[start : start + _TASK]) for start in range(0, len(names), _TASK)], []
    place = Images([root], max_pixels).packed(root)
    groups: dict[int, tuple[list[str], list[int]]] = {}
    elsewhere = []
    for name in names:
        if name in place:
            group, row = place[name]
            groups.setdefault(group, ([], []))
            groups[group][0].append(name)
            groups[group][1].append(row)
        else:
            elsewhere.append(name)
    return [_Task(root, found[0], group, found[1]) for group, found in sorted(groups.items())], elsewhere


def _look(work: tuple[_Task, int, bool]) -> tuple[list[str], dict[str, str], dict[str, int], int]:
    """(names that are not in this root, errors, hashes, images settled) of one task."""
    task, max_pixels, wanted = work
    missing: list[str] = []
    errors: dict[str, str] = {}
    hashes: dict[str, int] = {}
    for name, read in _packed(task) if task.rows else _loose(task):
        try:
            if read is None:
                missing.append(name)
            elif wanted:
                hashes[name] = _hash(name, read, task.root, max_pixels)
            elif not _fine(read, max_pixels):
                _images(task.root, max_pixels).open(name)
        except ImageError as error:
            errors[name] = str(error)
    return missing, errors, hashes, len(task.names) - len(missing)


# Reads (offset, bytes) of one image; a negative offset counts from its end. None: this root does not hold it.
_Read = Callable[[int, int], bytes]


def _loose(task: _Task) -> Iterator[tuple[str, _Read | None]]:
    root = Path(task.root).resolve()
    for name in task.names:
        folder, _, file = name.rpartition("/")
        descriptor = -1
        try:
            if file and "\\" not in name and "\0" not in name and _inside(str(root), folder):
                descriptor = os.open(f"{root}/{name}", os.O_RDONLY | os.O_NOFOLLOW)
            size = os.fstat(descriptor).st_size if descriptor >= 0 else 0
            yield name, _preader(descriptor, size)
        except (FileNotFoundError, NotADirectoryError):
            yield name, None
        except OSError:  # a symbolic link, no permission: `surf.images` decides
            yield name, _preader(-1, 0)
        finally:
            if descriptor >= 0:
                os.close(descriptor)


def _preader(descriptor: int, size: int) -> _Read:
    def read(offset: int, length: int) -> bytes:
        if descriptor < 0:
            return b""
        return os.pread(descriptor, length, offset if offset >= 0 else max(0, size + offset))

    return read


@lru_cache(maxsize=100_000)
def _inside(root: str, folder: str) -> bool:
    """Is the folder, its links followed, inside the root? Asked once a folder, not once an image."""
    if folder.startswith("/") or ".." in folder.split("/"):
        return False
    return Path(root, folder).resolve().is_relative_to(root)


def _packed(task: _Task) -> Iterator[tuple[str, _Read]]:
    column = _parquet(task.root).read_row_group(task.group, columns=["bytes"]).column("bytes")
    for name, row in zip(task.names, task.rows, strict=True):
        yield name, _slicer(memoryview(column[row].as_buffer() or b""))


def _slicer(data: memoryview) -> _Read:
    def read(offset: int, length: int) -> bytes:
        start = offset if offset >= 0 else max(0, len(data) + offset)
        return bytes(data[start : start + length])

    return read


def _fine(read: _Read, max_pixels: int) -> bool:
    """Whether header and end are those of a whole image of a permitted size. False: not certain."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # compared here
    for length in HEADS:
        try:
            image = Image.open(io.BytesIO(read(0, length)))
        except Exception:  # Pillow's parsers raise many kinds
            continue
        end = _ENDS.get(image.format or "")
        return end is not None and not too_large(image.width, image.height, max_pixels) and read(-len(end), len(end)) == end
    return False


def _hash(name: str, read: _Read, root: str, max_pixels: int) -> int:
    if _fine(read, max_pixels):
        try:
            return difference_hash(small(read(0, sys.maxsize >> 1)))
        except Exception:  # torn in the middle, or a kind of image that only a full decoder knows
            pass
    return difference_hash(_images(root, max_pixels).open(name))


@lru_cache(maxsize=8)
def _images(root: str, max_pixels: int) -> Images:
    return Images([root], max_pixels)


@lru_cache(maxsize=8)
def _parquet(path: str) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path)
