"""Image features cached by image, and images decoded ahead in threads, so that the model does not wait for files."""

import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

THREADS = 8  # one 640x480 JPEG takes some 10 ms of one core; a GPU takes fewer than 200 images a second
AHEAD = 128  # images decoded ahead: at 336 px and 16 bits they take 90 MB
FORWARD = 64  # images in one forward pass of the vision tower


def pool() -> ThreadPoolExecutor:
    """Threads that decode images."""
    return ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0))), "image")


class Ahead:
    """Calls `work` in threads on the names to come, in their order; ask for the results by name.

    No more work is begun until `fill` says so, or a name is asked for that is not at work: the caller chooses a time at which
    it does not need Python itself.

    Args:
        unless: says of a name, when its turn comes, that nobody will ask for it.
    """

    def __init__(
        self,
        threads: ThreadPoolExecutor,
        work: Callable[[str], Any],
        names: Iterable[str],
        unless: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.threads, self.work, self.unless = threads, work, unless
        self.waiting = deque(dict.fromkeys(names))
        self.running: dict[str, Future[Any]] = {}
        self.fill()

    def __call__(self, name: str) -> Any:
        """The result for `name`; raises what `work` raised."""
        if name not in self.running:
            self.fill()
        if future := self.running.pop(name, None):
            with suppress(Exception):  # what failed then, for want of memory, need not fail now
                return future.result()
        return self.threads.submit(self.work, name).result()

    def drop(self, name: str) -> None:
        """Forget a name that nobody will ask for: it makes room for another one."""
        if future := self.running.pop(name, None):
            future.cancel()

    def fill(self) -> None:
        """Begin with the next names, as many as may be ahead."""
        while self.waiting and len(self.running) < AHEAD:
            name = self.waiting.popleft()
            if name not in self.running and not self.unless(name):
                self.running[name] = self.threads.submit(self.work, name)

    def close(self) -> None:
        """Forget what was not asked for."""
        self.waiting.clear()
        for future in self.running.values():
            future.cancel()
        self.running.clear()


class Features:
    """What the language model sees of an image, kept on the device: the latest `limit` bytes.

    Args:
        encode: pixels of some images [images, 3, height, width] to their features [images, tokens, hidden].
        limit: bytes of features kept.
    """

    def __init__(self, encode: Callable[[Any], Any], limit: int) -> None:
        self.encode, self.limit, self.bytes = encode, limit, 0
        self.kept: OrderedDict[str, Any] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self.kept

    def __call__(self, names: Sequence[str], pixels: Mapping[str, Any]) -> list[Any]:
        """Features [tokens, hidden] of each image. `pixels` [3, height, width] has at least those that are not kept."""
        import torch

        found = {name: self.kept[name] for name in names if name in self.kept}
        missing = [name for name in dict.fromkeys(names) if name not in found]
        for start in range(0, len(missing), FORWARD):
            part = missing[start : start + FORWARD]
            made = self.encode(torch.stack([pixels[name] for name in part]))
            found.update((name, features.clone()) for name, features in zip(part, made, strict=True))  # no view of the batch
        for name in dict.fromkeys(names):
            if name not in self.kept:
                self.bytes += found[name].nbytes
            self.kept[name] = found[name]
            self.kept.move_to_end(name)
        while self.bytes > self.limit and self.kept:
            _, dropped = self.kept.popitem(last=False)
            self.bytes -= dropped.nbytes
        return [found[name] for name in names]

    def clear(self) -> None:
        """Drop everything."""
        self.kept.clear()
        self.bytes = 0
