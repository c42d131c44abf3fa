"""The files that the config names, and which of them are not there. Snakemake asks too, so nothing heavy is imported."""

from collections.abc import Callable
from pathlib import Path

from surf.config import Config

_DRAWN = ("corpus.json", "sft.json", "packed.parquet", "images")  # what rule `demo` writes
_SPLITS = ("random", "popular", "adversarial")  # of its POPE files
_FOLDERS = ("corpus", "pope", "sft")  # of its images


def named(cfg: Config) -> list[tuple[str, str, Callable[[Path], bool]]]:
    """(what it is, the path, whether it is there) of all files and image roots."""
    return [
        *(("captions", path, Path.is_file) for path in cfg.catalog.captions),
        *(("conversations", path, Path.is_file) for path in cfg.split.conversations),
        *(("questions", path, Path.exists) for task in cfg.evaluate.tasks.values() for path in task.files.values()),
        *(("image root", path, Path.exists) for path in cfg.images.roots),
    ]


def missing(cfg: Config) -> tuple[list[tuple[str, str]], list[str]]:
    """((what it is, path) of those that the user has to bring, those that rule `demo` draws) of all that are not there."""
    absent = [(what, path) for what, path, there in named(cfg) if not there(Path(path))]
    drawn = [path for _, path in absent if draws(cfg, path)]
    return [(what, path) for what, path in absent if path not in drawn], drawn


def draws(cfg: Config, path: str) -> bool:
    """Does rule `demo` make this path? Not all that lies below its folder: a misspelt name does not come of itself."""
    if cfg.demo is None:
        return False
    out = Path(cfg.demo.out).absolute()
    made = {out, *(out / name for name in _DRAWN)}
    made |= {out / "images" / name for name in _FOLDERS} | {out / f"pope/coco_pope_{split}.json" for split in _SPLITS}
    return Path(path).absolute() in made
