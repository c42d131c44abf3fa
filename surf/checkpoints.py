"""Checkpoints of `finetune`: which one to go on from, and how the finished model takes its place.

`model/_checkpoints/run.json` holds the fingerprint of the run, and, once it is finished, what stands in `model.json`.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surf import store

log = logging.getLogger("surf")

WHOLE = "_whole"  # marks a checkpoint that every process has finished writing


def rank() -> int:
    """Number of this process among those that train together; process 0 writes and speaks."""
    return int(os.environ.get("RANK", "0"))


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
    """The last whole checkpoint of this run. All others are deleted: of other runs, and those that a kill left torn."""
    same = _read_run(checkpoints).get("fingerprint") == run["fingerprint"]
    found = [path for path in checkpoints.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    found.sort(key=lambda path: int(path.name.removeprefix("checkpoint-")))
    whole = [path for path in found if same and (path / WHOLE).exists()]
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
        for old in [out / "model.json", *out.glob("*.safetensors"), *out.glob("*.safetensors.index.json")]:
            old.unlink(missing_ok=True)
        for new in fresh.iterdir():
            if new.is_dir():
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
