"""How a stage keeps its devices busy: one worker process for each device, and two lanes of rows in each process.

A stage with several devices goes like this; with one device, or none, `wanted` is 0 and all rows are its own.

    if count := workers.wanted():
        (table,), errors = workers.lead(count, [partial], total, desc="answer", unit="round")
    else:
        table, errors = …  # the work, on workers.mine(rows, key), saved in `partial`
        if workers.report(errors, table.num_rows):
            return  # a worker: the leader goes on

Workers run the command line of their leader. They save into the same `store.Partial`, whose files have unique names, and take
rows by the hash of a key, so that no result depends on their number.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from surf import store
from surf.errors import SurfError
from surf.shards import shard_of

log = logging.getLogger("surf")
T = TypeVar("T")
R = TypeVar("R")

COUNT = "SURF_WORKERS"  # number of workers; without it, one for each GPU that is seen
ROLE = "SURF_WORKER"  # set for workers: their number, how many there are, where their errors go
SWITCH = 5e-4  # seconds for which a lane that prepares may hold up the one that feeds the device; Python's default is 5e-3
_LOOK = 1.0  # seconds between two looks at the workers


def wanted() -> int:
    """How many workers this process shall lead; 0 if it does the work itself.

    Raises:
        SurfError: SURF_WORKERS is no number.
    """
    if _role():
        threading.Thread(target=_end_with_leader, daemon=True).start()
        return 0
    text = os.environ.get(COUNT)
    if text is None:
        import torch

        count = torch.cuda.device_count()
    elif text.isdecimal():
        count = int(text)
    else:
        raise SurfError("is no number", where=f"{COUNT}={text}", expected="the number of worker processes, 1 for none")
    return count if count > 1 else 0


def mine(rows: Iterable[T], key: Callable[[T], str]) -> list[T]:
    """The rows of this process: all of them, or a worker's share. Rows with equal keys stay together."""
    role = _role()
    return [row for row in rows if not role or shard_of(f"worker {key(row)}", role["count"]) == role["index"]]


def report(errors: dict[str, str], rows: int) -> bool:
    """If this process is a worker: tell the leader its errors, and how many rows of its share are saved."""
    role = _role()
    if role:
        store.write_json(Path(role["result"]), {"errors": errors, "rows": rows})
    return bool(role)


def lead(
    count: int, partials: Sequence[store.Partial], total: int | None, *, desc: str, unit: str = "row"
) -> tuple[list[pa.Table], dict[str, str]]:
    """Run this process's command line in `count` workers, one a device, until all of them are done.

    SIGTERM, SIGINT and SIGUSR1 are passed on. Workers end when their leader does, whatever ended it.

    Args:
        partials: where the workers save their rows.
        total: rows of the job, for the progress bar; None if nobody knows yet.

    Returns:
        (what each of `partials` holds in the end, the errors of all workers)

    Raises:
        SurfError: a worker failed; the others are ended, finished rows stay. Or rows are gone that a worker had saved.
        SystemExit: 128 + the number of a signal that came.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"{index}.json" for index in range(count)]
        crew = [_Worker(index, count, result) for index, result in enumerate(results)]
        try:
            with _passed_on(crew) as came, _Progress(partials, total, desc, unit) as progress:
                while any(worker.process.poll() is None for worker in crew):
                    if not came and any(worker.process.poll() for worker in crew):
                        break
                    progress.look()
                    time.sleep(_LOOK)
        finally:
            failed = next((worker for worker in crew if worker.process.poll()), None)
            for worker in crew:
                worker.end()
        if came:
            raise SystemExit(128 + came[0])
        if failed:
            code = failed.process.returncode
            how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
            raise SurfError(
                f"worker {failed.index + 1} of {count} {how}: {failed.last}",
                where=desc,
                next="see its lines above; finished rows are kept, and the same command goes on from them",
            )
        reports = [store.read_json(result) for result in results]
        tables = [partial.read(earlier=False) for partial in partials]
    # A second job may have finished the part, and its saved rows been forgotten, while the slower workers were at work.
    if sum(table.num_rows for table in tables) < sum(one["rows"] for one in reports):
        raise store.forgotten(partials[0].out)
    return tables, {key: error for one in reports for key, error in one["errors"].items()}


def lanes(slices: Iterable[Sequence[T]], work: Callable[[Sequence[T]], R]) -> Iterator[R]:
    """`work` on each slice, two at a time: one is prepared or saved while the model answers the other. In their order.

    When an error, or a signal, ends this, slices at work are finished first.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        with ThreadPoolExecutor(2, "lane") as threads:
            running: deque[Future[R]] = deque()
            for one in slices:
                running.append(threads.submit(work, one))
                if len(running) == 2:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
    finally:
        sys.setswitchinterval(before)


class _Worker:
    """One process on one device; its lines come out under its number."""

    def __init__(self, index: int, count: int, result: Path) -> None:
        self.index, self.last = index, "without a word"
        environment = {**os.environ, ROLE: json.dumps({"index": index, "count": count, "result": str(result)})}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(number) for number in range(count)]
        environment["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
        environment["TQDM_DISABLE"] = "1"
        self.process = subprocess.Popen(
            [sys.executable, *_command()],
            env=environment,
            stdin=subprocess.PIPE,  # it ends when the leader does: see `_end_with_leader`
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C comes through the leader, once
        )
        self.reader = threading.Thread(target=self._read, args=(f"[{index + 1}/{count}] ",), daemon=True)
        self.reader.start()

    def end(self) -> None:
        """End the process, at once if need be."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self.reader.join(10)
        if self.process.stdin:
            self.process.stdin.close()

    def _read(self, head: str) -> None:
        for line in self.process.stderr or ():
            if line.strip():
                self.last = line.strip()
            sys.stderr.write(head + line)
            sys.stderr.flush()


class _Progress:
    """A bar over the rows that all workers have saved."""

    def __init__(self, partials: Sequence[store.Partial], total: int | None, desc: str, unit: str) -> None:
        from tqdm import tqdm

        self.partials, self.seen = partials, set[Path]()
        interval = 0.5 if sys.stderr.isatty() else 10.0
        before = self._fresh()
        self.bar = tqdm(total=total, initial=before, desc=desc, unit=f" {unit}s", mininterval=interval, dynamic_ncols=True)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.look()
        self.bar.close()

    def look(self) -> None:
        self.bar.update(self._fresh())

    def _fresh(self) -> int:
        new = {path for partial in self.partials for path in partial.folder.glob("*.parquet")} - self.seen
        self.seen |= new
        rows = 0
        for path in new:
            try:
                rows += store.footer(path)[0].num_rows
            except SurfError:  # torn, or swept away: `Partial.read` deals with it
                continue
        return rows


@contextmanager
def _passed_on(crew: Sequence[_Worker]) -> Iterator[list[int]]:
    """Signals that come meanwhile go to all workers; the list holds their numbers."""
    came: list[int] = []

    def forward(number: int, _frame: object) -> None:
        came.append(number)
        for worker in crew:
            worker.process.send_signal(number)

    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _command() -> list[str]:
    """What stood behind `python` on the command line of this process."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return (["-m", spec.name] if spec else [sys.argv[0]]) + sys.argv[1:]


def _role() -> dict[str, Any]:
    return dict(json.loads(os.environ.get(ROLE, "{}")))


def _end_with_leader() -> None:
    while os.read(0, 1):  # until the leader's end of the pipe is closed
        pass
    os.kill(os.getpid(), signal.SIGTERM)
