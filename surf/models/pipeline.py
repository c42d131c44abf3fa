"""From image names to batches of pixels, ahead of the model: processes read and decode.

The images are cut into pieces, each one process's work at a time. Packed images are taken in the order of their files, and
every process has a stretch of that order for itself: it reads a row group once, and only where two stretches meet do two
processes read the same one. Pixels come back in shared memory.
"""

import logging
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from multiprocessing.connection import wait
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from surf.errors import ImageError, SurfError
from surf.images import Images
from surf.telemetry import Meter

log = logging.getLogger("surf")
PIECE = 64  # images that a process decodes at a time, at most
AHEAD = 2  # pieces of each process that are being decoded, or wait for the model
SHARED = Path("/dev/shm")  # where Linux keeps shared memory; containers often give it 64 MB


@dataclass
class Piece:
    """Some decoded images; a place is an image's position among the names that were asked for."""

    places: list[int]  # of the rows of `pixels`
    pixels: Any  # uint8 tensor [len(places), height, width, 3] on the CPU; zeros where an image cannot be decoded
    left: list[int] = field(default_factory=list)  # places of the JPEG files that are left to the GPU
    sizes: list[int] = field(default_factory=list)  # bytes of each of these
    files: Any = None  # uint8 tensor: these files one after the other
    errors: dict[int, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # busy times

    def pin_memory(self) -> "Piece":
        """Called by the DataLoader: from page-locked memory a GPU copies faster and in the background."""
        if self.places:
            self.pixels = self.pixels.pin_memory()
        return self


@dataclass
class Batch:
    """Some images on their way to the model; place i of the batch is for the image with number `numbers[i]`."""

    numbers: list[int] = field(default_factory=list)
    pixels: list[tuple[list[int], Any]] = field(default_factory=list)  # places and their pixels, see `Piece`
    encoded: dict[int, Any] = field(default_factory=dict)  # place to a JPEG file (uint8 tensor) that is left to the GPU
    errors: dict[int, str] = field(default_factory=dict)  # place to what is wrong with the image

    def add(self, numbers: Sequence[int], piece: Piece) -> None:
        """Append a piece with the images `numbers`."""
        start = len(self.numbers)
        self.numbers.extend(numbers)
        self.pixels.append(([start + place for place in piece.places], piece.pixels))
        if piece.left:
            self.encoded.update(zip((start + place for place in piece.left), piece.files.split(piece.sizes), strict=True))
        self.errors.update((start + place, error) for place, error in piece.errors.items())


@dataclass(frozen=True)
class Decoder:
    """How a file becomes pixels.

    Args:
        crop: PIL image to PIL image of `size`.
        size: (height, width) that the model wants.
        draft: JPEG files are decoded at a half, a quarter or an eighth of their size where that is not below `size`.
        on_gpu: says of a file that the GPU shall decode it; it is left as it is.
    """

    images: Images
    crop: Callable[[Any], Any]
    size: tuple[int, int]
    draft: bool = False
    on_gpu: Callable[[bytes], bool] | None = None

    def pixels(self, data: bytes) -> np.ndarray:
        """uint8 [height, width, 3]. Raises ImageError: the file is no usable image."""
        return np.array(self.crop(self.images.decode(data, self.size if self.draft else None)))

    def piece(self, names: Sequence[str]) -> Piece:
        """All of `names`, read and decoded."""
        import torch

        start = perf_counter()
        own: dict[int, bytes] = {}
        left: dict[int, bytes] = {}
        errors: dict[int, str] = {}
        for place, name in enumerate(names):
            try:
                data = self.images.read(name)
            except ImageError as error:
                errors[place] = str(error)
            else:
                (left if self.on_gpu is not None and self.on_gpu(data) else own)[place] = data
        read = perf_counter()
        pixels = torch.zeros((len(own), *self.size, 3), dtype=torch.uint8).share_memory_()
        rows = pixels.numpy()
        for row, (place, data) in enumerate(own.items()):
            try:
                rows[row] = self.pixels(data)
            except ImageError as error:
                errors[place] = str(error)
        piece = Piece(list(own), pixels, list(left), [len(data) for data in left.values()], errors=errors)
        if left:
            piece.files = torch.frombuffer(bytearray(b"".join(left.values())), dtype=torch.uint8).share_memory_()
        piece.seconds = {"read": read - start, "decode": perf_counter() - read}
        return piece


class _Pieces:
    """A dataset for torch: item k is piece k."""

    def __init__(self, decoder: Decoder, names: Sequence[str], pieces: Sequence[Sequence[int]]) -> None:
        self.decoder, self.names, self.pieces = decoder, names, pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, k: int) -> Piece:
        return self.decoder.piece([self.names[number] for number in self.pieces[k]])

    def begin(self, _worker: int) -> None:
        """Called in every new process. Signals are its parent's business: that one ends it."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        self.decoder.images.reopen()


def batches(
    names: Sequence[str], decoder: Decoder, *, batch_size: int, workers: int, pinned: bool, meter: Meter
) -> Generator[Batch, None, None]:
    """All images in decoded batches, in an order that is good for reading; the next ones are made meanwhile.

    Args:
        workers: processes that read and decode; with 0, and for few images, this process does it.
        pinned: pixels lie in page-locked memory.
        meter: gets the busy times of "read" and "decode" (shared out over the processes).

    Raises:
        SurfError: a process was killed, or there is no room for what it made.
    """
    together = -(-batch_size // PIECE)  # pieces of a batch
    size = batch_size // together
    order = decoder.images.order(names)
    pieces: Sequence[Sequence[int]] = [order[start : start + size] for start in range(0, len(order), size)]
    workers = _fitting(min(workers, len(pieces) // 2), size * decoder.size[0] * decoder.size[1] * 3)
    pieces = _dealt(pieces, max(1, workers))
    batch = Batch()
    for k, piece in enumerate(_made(_Pieces(decoder, names, pieces), workers, pinned), 1):
        for what, seconds in piece.seconds.items():
            meter.add(what, seconds / max(1, workers))
        batch.add(pieces[k - 1], piece)
        if k % together == 0 or k == len(pieces):
            yield batch
            batch = Batch()


def _dealt(pieces: Sequence[Sequence[int]], hands: int) -> list[Sequence[int]]:
    """The pieces in such an order that, dealt out one by one, each hand gets a stretch of them."""
    bounds = [-(-len(pieces) * hand // hands) for hand in range(hands + 1)]
    stretches = [pieces[start:end] for start, end in pairwise(bounds)]
    stretches.sort(key=len, reverse=True)  # the longer ones (by one piece) first: the last round goes on from the first hand
    return [piece for turn in zip_longest(*stretches) for piece in turn if piece is not None]


def _fitting(workers: int, piece_bytes: int) -> int:
    """As many of `workers` as there is shared memory for."""
    if not workers or not SHARED.is_dir():
        return workers
    free = shutil.disk_usage(SHARED).free
    fit = min(workers, free // ((AHEAD + 1) * piece_bytes))
    if fit < workers:
        needed = workers * (AHEAD + 1) * piece_bytes / 2**20
        log.warning(
            "%s has %d MB left, %d processes that decode need %d: %d decode (docker: --shm-size; a smaller embed.batch_size)",
            *(SHARED, free / 2**20, workers, needed, fit or 1),
        )
    return fit


def _made(dataset: _Pieces, workers: int, pinned: bool) -> Iterator[Piece]:
    """All pieces, in their order. A DataLoader deals them out to its processes one by one, as `_dealt` expects."""
    import torch
    from PIL import Image, ImageOps  # noqa: F401 - here, and not in every process

    Image.init()
    before = set(multiprocessing.active_children())
    handler = signal.getsignal(signal.SIGCHLD)
    loader: Any = torch.utils.data.DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=workers,
        collate_fn=lambda piece: piece,
        pin_memory=pinned,
        worker_init_fn=dataset.begin,
        multiprocessing_context="fork" if workers else None,
        prefetch_factor=AHEAD if workers else None,
        generator=torch.Generator(),
    )
    loaded = iter(loader)
    if signal.getsignal(signal.SIGCHLD) is not handler:
        signal.signal(signal.SIGCHLD, handler)  # torch's raises errors wherever this process happens to be
    processes = set(multiprocessing.active_children()) - before
    try:
        yield from loaded
    except Exception as error:
        if isinstance(error, ConnectionError | EOFError):  # a process is gone, or nearly so
            wait([process.sentinel for process in processes], 5)
        if "shared memory" in str(error):
            found = f"{SHARED} is full ({error})"
        elif ended := [process.exitcode for process in processes if process.exitcode]:
            found = f"a process that decodes was ended (exit code {ended[0]}; -9 mostly says that memory ran out)"
        else:
            raise
        again = "fewer embed.workers, a smaller embed.batch_size or more memory for the job; finished rows are kept"
        raise SurfError(found, where="embed", next=again) from error
    finally:
        for process in processes:  # after an error or a signal; what they decode, nobody will ask for
            process.terminate()
        for process in processes:
            process.join()
