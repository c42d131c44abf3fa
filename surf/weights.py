"""Are the models here? Looks for files, in local folders and in the Hugging Face cache; loads no weights, asks no network."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from surf.config import Config
from surf.errors import SurfError

_PROCESSOR = ("processor_config.json", "preprocessor_config.json")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")


class Model(NamedTuple):
    """Where a model lies, if it is whole; else what is wrong, and whether the first job could download it."""

    folder: Path | None
    problem: str = ""
    downloadable: bool = False


def lvlm(cfg: Config) -> Model:
    """`lvlm.model`: config, safetensors weights, processor and tokenizer."""
    return _transformers(cfg.lvlm.model, {"config": ("config.json",), "processor": _PROCESSOR, "tokenizer": _TOKENIZER})


def bert(cfg: Config) -> Model:
    """`score.bertscore_model`: config, safetensors weights and tokenizer."""
    return _transformers(cfg.score.bertscore_model, {"config": ("config.json",), "tokenizer": _TOKENIZER})


def clip(cfg: Config) -> Model:
    """`embed.model` and `embed.pretrained`: a local-dir:FOLDER of open_clip, or a name whose weights are in the cache."""
    kind, _, path = cfg.embed.model.partition("local-dir:")
    if not kind and path:
        return _whole(Path(path), {"open_clip_config.json": ("open_clip_config.json",)}, path)
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    if cfg.embed.model not in open_clip.list_models():
        return Model(None, f"open_clip knows no model {cfg.embed.model}")
    about = get_pretrained_cfg(cfg.embed.model, cfg.embed.pretrained or "")
    if not about:
        return Model(None, f"open_clip knows no weights {cfg.embed.pretrained!r} of {cfg.embed.model}")
    hub, url = about.get("hf_hub", ""), about.get("url", "")
    if not hub:
        return Model(None, f"has pickled weights only ({url}), which could run code")
    repository = hub.rpartition("/")[0]
    folder = _snapshot(repository)
    if folder and any(folder.glob("*.safetensors")):
        return Model(folder)
    return _absent(repository)


def dim(cfg: Config) -> int | None:
    """Numbers in one embedding, read from the model's config."""
    path = Path(cfg.embed.model.removeprefix("local-dir:"), "open_clip_config.json")
    if path.is_file():
        return int(_json(path)["model_cfg"]["embed_dim"])
    if cfg.embed.model.startswith("local-dir:"):
        return None
    import open_clip

    about = open_clip.get_model_config(cfg.embed.model)
    return int(about["embed_dim"]) if about else None


def parameters(folder: Path, parts: list[str]) -> tuple[int, int]:
    """(all, those whose name contains one of `parts`) parameters of a vision-language model, by the names that a stage sees.

    Raises:
        SurfError: see `blank`.
    """
    sizes = {name: weight.numel() for name, weight in blank(folder).named_parameters()}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if any(part in name for part in parts))


def blank(folder: Path) -> Any:
    """The vision-language model of a folder without its weights: the modules and names that a stage will see, in no memory.

    Raises:
        SurfError: transformers cannot make it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        what = f"transformers cannot make it ({str(error).strip().splitlines()[0]})"
        raise SurfError(what, where=f"lvlm.model {folder}", expected="an image-text-to-text model that it knows") from None


def offline() -> bool:
    """Whether the environment forbids the hub."""
    return any(
        os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _transformers(name: str, needed: Mapping[str, tuple[str, ...]]) -> Model:
    if Path(name).is_dir():
        return _whole(Path(name), needed, name)
    words = name.split("/")
    if len(words) > 2 or words[0] in ("", ".", "..", "~"):
        return Model(None, "there is no such folder")
    folder = _snapshot(name)
    if folder is None:
        return _absent(name)
    found = _whole(folder, needed, name)
    return found if found.folder else Model(None, f"{found.problem}; next: hf download {name}", not offline())


def _absent(repository: str) -> Model:
    if offline():
        what = "is not in the Hugging Face cache, and HF_HUB_OFFLINE is set"
        return Model(None, f"{what}; next: HF_HUB_OFFLINE=0 hf download {repository}")
    what = "is not in the Hugging Face cache: nodes that run its jobs will need a network"
    return Model(None, f"{what}; next: hf download {repository}", True)


def _snapshot(repository: str) -> Path | None:
    """Folder of the repository in the Hugging Face cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except Exception:  # not there, or no name of a repository
        return None


def _whole(folder: Path, needed: Mapping[str, tuple[str, ...]], name: str) -> Model:
    if not folder.is_dir():
        return Model(None, "there is no such folder")
    lacks = [what for what, files in needed.items() if not any((folder / file).is_file() for file in files)]
    weights = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        lacks += sorted(file for file in set(_json(index)["weight_map"].values()) if not (folder / file).is_file())
    if not weights and not lacks:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        lacks.append("safetensors weights" + (", only pickled ones, which could run code" if pickled else ""))
    torn = [path.name for path in weights if not _untorn(path)]
    if lacks or torn:
        words = [f"has no {', '.join(lacks)}"] if lacks else []
        return Model(None, "; ".join(words + [f"{path} is cut off" for path in torn]))
    return Model(folder)


def _untorn(path: Path) -> bool:
    """Whether the file is as long as its header says (safetensors format: 8 bytes, a JSON header, the data)."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        end = max((about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"), default=0)
        return path.stat().st_size == 8 + length + end
    except (OSError, ValueError, KeyError, MemoryError, OverflowError):
        return False


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes()))
