"""From image names to batches of pixels, ahead of the model: one thread reads, many decode.

Packed images are read in the order of their files, a row group at a time; single files are read by the threads that decode
them. Every batch is one block of memory that these threads fill, with zeros where there is no image: all batches have one
shape, so that a row's bits do not depend on its neighbours.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from surf.errors import ImageError
from surf.images import Images
from surf.telemetry import Meter

AHEAD = 4  # batches that are being read and decoded before the model asks for them


@dataclass
class Batch:
    """Some images on their way to the model; place i of the batch is for the image with number `numbers[i]`."""

    numbers: list[int]
    pixels: Any  # uint8 tensor [batch size, height, width, 3] on the CPU
    encoded: dict[int, bytes] = field(default_factory=dict)  # place to a JPEG file that is left to the GPU
    errors: dict[int, ImageError] = field(default_factory=dict)  # place to what is wrong with the image
    futures: list[Future[None]] = field(default_factory=list)


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


def batches(
    names: Sequence[str], decoder: Decoder, *, batch_size: int, workers: int, pinned: bool, meter: Meter
) -> Iterator[Batch]:
    """All images in decoded batches, in an order that is good for reading; the next ones are made meanwhile.

    Args:
        workers: threads that decode.
        pinned: pixels lie in page-locked memory, from which a GPU copies faster and in the background.
        meter: gets the busy times of "read" and "decode" (shared out over the threads).
    """
    import torch

    workers = max(1, workers)
    made: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
    free, stop = threading.Semaphore(AHEAD), threading.Event()

    def fill(batch: Batch, place: int, read: Callable[[], bytes]) -> None:
        start = middle = perf_counter()
        try:
            data = read()
            middle = perf_counter()
            if decoder.on_gpu is not None and decoder.on_gpu(data):
                batch.encoded[place] = data
            else:
                batch.pixels[place] = torch.from_numpy(decoder.pixels(data))
        except ImageError as error:
            batch.errors[place] = error
        meter.add("read", (middle - start) / workers)
        meter.add("decode", (perf_counter() - middle) / workers)

    def produce() -> None:
        try:
            order = decoder.images.order(names)
            for start in range(0, len(names), batch_size):
                free.acquire()
                if stop.is_set():
                    return
                pixels = torch.zeros((batch_size, *decoder.size, 3), dtype=torch.uint8, pin_memory=pinned)
                batch = Batch(order[start : start + batch_size], pixels)
                for place, number in enumerate(batch.numbers):
                    with meter("read"):
                        read = decoder.images.reader(names[number])
                    batch.futures.append(pool.submit(fill, batch, place, read))
                made.put(batch)
        finally:
            made.put(None)

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(workers) as pool:
        whole = reader.submit(produce)
        try:
            while (batch := made.get()) is not None:
                for future in batch.futures:
                    future.result()
                yield batch
                free.release()
            whole.result()
        finally:
            stop.set()
            free.release()
