"""Checkpoints of `finetune`: which one to go on from, and how the finished model takes its place.

`model/_checkpoints/run.json` holds the fingerprint of the run, and, once it is finished, what stands in `model.json`.
"""

import fcntl
import json
import logging
import os
import shlex
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surf import store
from surf.errors import SurfError

log = logging.getLogger("surf")

WHOLE = "_whole"  # written last into a checkpoint: the sizes of its files, by name


def rank() -> int:
    """Number of this process among those that train together; process 0 writes and speaks."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Only one training writes a model folder; a second one would tear its checkpoints.

    Raises:
        SurfError: another one is at work, a job left over from a killed run for example.
    """
    if rank():
        yield
        return
    path = out / "_checkpoints" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            who = lock.read() or "another process"
            what, expected = f"{who} is training this model", "one training at a time"
            raise SurfError(
                what, where=str(out), expected=expected, next="end it, or wait for its end; then run again"
            ) from None
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s): see to it that no second job trains this model", out, error.strerror)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def mark(checkpoint: Path) -> None:
    """Say that a checkpoint is whole; every process has written its files."""
    store.write_json(checkpoint / WHOLE, _sizes(checkpoint))


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != WHOLE]
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}


def _is_whole(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / WHOLE).read_bytes()) == _sizes(checkpoint))
    except (OSError, ValueError):
        return False


def restore(out: Path, run: dict[str, Any]) -> bool:
    """Whether this very run has been completed before; `model.json`, which Snakemake may have deleted, is then put back."""
    before = _read_run(out / "_checkpoints")
    if before.get("fingerprint") != run["fingerprint"] or not before.get("result") or not any(out.glob("*.safetensors")):
        return False
    log.info("%s was finished before: nothing to train", out)
    if not rank():
        store.write_json(out / "model.json", before["result"])
    return True


def last(checkpoints: Path, run: dict[str, Any]) -> str | None:
    """The last whole checkpoint of this run. All others are deleted: of other runs, and those that a kill left torn.

    Checkpoints of another number of processes are of another run: DeepSpeed cannot read them (its parts of weights and
    optimizer state have other sizes), and the batch of a step is another one.
    """
    before = _read_run(checkpoints)
    same = before.get("fingerprint") == run["fingerprint"]
    found = [path for path in checkpoints.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    found.sort(key=lambda path: int(path.name.removeprefix("checkpoint-")))
    whole = [path for path in found if same and _is_whole(path)]
    if found and not same:
        old, new = (set(shlex.split(str(one.get("flags", "")))) for one in (before, run))
        why = f"{' '.join(sorted(old - new))}, now {' '.join(sorted(new - old))}" if old != new else "other data or weights"
        log.warning("training begins anew: %d checkpoints here are of another run (%s) and are deleted", len(found), why)
    for path in found:
        if path not in whole:
            shutil.rmtree(path, ignore_errors=True)
    store.write_json(checkpoints / "run.json", run)
    if whole:
        log.info("going on from %s", whole[-1])
    return str(whole[-1]) if whole else None


def _read_run(checkpoints: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((checkpoints / "run.json").read_bytes()))
    except (OSError, ValueError):
        return {}


def publish(save: Callable[[Path], None], out: Path, run: dict[str, Any]) -> None:
    """Write the model folder: into a folder beside it, then file by file into place, `model.json` last.

    `save` writes the model into a folder; every process calls it.
    """
    checkpoints = out / "_checkpoints"
    fresh = checkpoints / "_result"
    if not rank():
        shutil.rmtree(fresh, ignore_errors=True)
    save(fresh)
    if not rank():
        (out / "model.json").unlink(missing_ok=True)
        for pattern in ("*.safetensors", "*.safetensors.index.json", "adapter_*"):
            for old in out.glob(pattern):
                old.unlink(missing_ok=True)
        for new in fresh.iterdir():
            if new.is_file():
                with open(new, "rb") as file:
                    os.fsync(file.fileno())
            else:
                shutil.rmtree(out / new.name, ignore_errors=True)
            os.replace(new, out / new.name)
        fresh.rmdir()
        store.write_json(checkpoints / "run.json", run)
        store.write_json(out / "model.json", run["result"])
        for path in checkpoints.glob("checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)


def weights_of(model: str) -> list[list[Any]]:
    """Sizes and times of a local model's files: an exchanged base model must not be trained on from old checkpoints."""
    files = sorted([*Path(model).glob("*.safetensors"), *Path(model).glob("*.json")]) if Path(model).is_dir() else []
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
