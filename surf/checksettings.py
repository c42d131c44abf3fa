"""Settings that are well formed and yet stop a stage: what the installed packages, the models and the index make of them."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from surf import config, prompts, weights
from surf.errors import SurfError
from surf.verdicts import Report

_KINDS = {"positive_only": 1, "negative_only": 1, "no_reference": 0}  # of training samples, and how many references they show


def finetunes(cfg: config.Config) -> Iterator[tuple[str, config.Pair, config.Finetune]]:
    """(what stands before their keys, `pair`, `finetune`) of each fine-tune that the workflow runs."""
    yield "", cfg.pair, cfg.finetune
    for name in cfg.variants:
        if name not in unused(cfg):
            yield f"variants.{name}.", *cfg.variant(name)


def unused(cfg: config.Config) -> list[str]:
    """Variants that no method answers by."""
    used = {method.model for method in cfg.evaluate.all_methods().values()}
    return [name for name in cfg.variants if name not in used]


def variants(report: Report, cfg: config.Config) -> None:
    """Is every variant of use?"""
    for name in unused(cfg):
        what = f"variants.{name} is never trained: no method has model: {name}"
        report.warning("variants", f"{what}; next: add one to evaluate.methods, or remove the variant")


def packages(report: Report, cfg: config.Config) -> None:
    """Are the packages there that come with an extra?"""
    from surf.training import network

    wanted: dict[str, tuple[str, str]] = {}  # once each, by the first setting that wants it
    for before, _, finetune in finetunes(cfg):
        for package in network.PACKAGES.get(finetune.method, []):
            wanted.setdefault(package, (f"{before}finetune.method: {finetune.method}", finetune.method))
        for package in finetune.report_to:
            wanted.setdefault(package, (f"{before}finetune.report_to: {package}", "tracking"))
    for name, task in cfg.evaluate.tasks.items():
        for package in ("sacrebleu", "rapidfuzz") if task.kind == "caption" else ():
            wanted.setdefault(package, (f"evaluate.tasks.{name}.kind: caption", "captions"))
    for package, (where, extra) in wanted.items():
        if not find_spec(package):
            report.wrong("packages", f"{where}: {package} is not installed; next: pip install 'surf-rag[{extra}]'")


def encoder(report: Report, cfg: config.Config, folder: Path) -> None:
    """Has BERTScore's encoder, in `folder`, the layer?"""
    from transformers import AutoConfig

    try:
        depth = AutoConfig.from_pretrained(folder).num_hidden_layers
    except (OSError, ValueError, KeyError, AttributeError):  # the stage's own reader may know better
        return
    if cfg.score.bertscore_layer > depth:
        what = f"{cfg.score.bertscore_model} has {depth} layers, not {cfg.score.bertscore_layer}"
        report.wrong("models", f"score.bertscore_layer: {what}; expected 1 to {depth}")


def training(report: Report, cfg: config.Config, folder: Path) -> None:
    """Do `finetune.train` and `finetune.max_tokens` fit the vision-language model in `folder`, for all fine-tunes?"""
    from surf.processing import load_processor
    from surf.training import network

    lvlm = cfg.lvlm.model_copy(update={"model": str(folder)})
    model = report.attempt("models", lambda: weights.blank(folder))
    processor = report.attempt("models", lambda: load_processor(lvlm))
    seen = []
    for before, pair, finetune in finetunes(cfg):
        key = (finetune.train, finetune.method == "full")
        if model and key not in seen:
            seen.append(key)
            names = _said(report, before, lambda one=finetune: network.trained(model, one))
            if names:
                sizes = {name: weight.numel() for name, weight in model.named_parameters()}
                some, what = sum(sizes[name] for name in names), "are trained" if key[1] else "get adapters"
                report.ok("finetune", f"{before}finetune.train: {some:,} of {sum(sizes.values()):,} parameters {what}")
        least = _said(report, before, lambda one=pair: shortest(one, processor, lvlm)) if processor else None
        if least and least > finetune.max_tokens:
            what = f"{before}finetune.max_tokens = {finetune.max_tokens}: the shortest question with its images"
            report.wrong("finetune", f"{what} takes {least} tokens; next: raise it")


def shortest(pair: config.Pair, processor: Any, lvlm: config.Lvlm) -> int:
    """Tokens of the shortest training text that can be: small images, and hardly a word.

    Raises:
        SurfError: the layout cannot show the references of one of the kinds in `pair.mix`.
    """
    from surf import processing

    shares = pair.mix.model_dump()
    numbers = {_KINDS[kind] for kind, share in shares.items() if share} | ({2} if round(sum(shares.values()), 9) < 1 else set())
    lengths = []
    for number in numbers:
        prompt = prompts.from_options("?", "image", [prompts.Reference("image", "")] * number, lvlm)
        text = processing.with_end(processor, prompts.chat(processor, prompt, "."))
        text = processing.expand(processor, text, [(64, 64)] * len(prompt.images), lvlm)
        lengths.append(len(processing.token_ids(processor, text)))
    return min(lengths)


def index(report: Report, cfg: config.Config, vectors: int | None) -> None:
    """Does FAISS take `build_index.factory` for so many embeddings of the model's length? None: nobody knows how many yet."""
    from surf.build_index import new_index

    dim, factory = weights.dim(cfg), cfg.build_index.factory
    if dim is None or factory == "auto":
        return
    empty = report.attempt("index", lambda: new_index(factory, dim, cfg.build_index))
    if empty is None:
        return
    needed = _to_train(empty)
    if vectors is not None and needed > vectors:
        what = f"build_index.factory = {factory!r}: needs {needed:,} vectors to train on, the corpus has {vectors:,}"
        report.wrong("index", f"{what}; next: fewer lists, or auto")
    else:
        report.ok("index", f"build_index.factory = {factory!r}: FAISS takes it, for vectors of {dim:,} numbers")


def _to_train(empty: Any) -> int:
    """Vectors that FAISS needs at least: one for each inverted list and for each centroid of a product quantiser."""
    import faiss

    if empty.is_trained:
        return 1
    inner = faiss.try_extract_index_ivf(empty) or empty
    inner = faiss.downcast_index(inner.index if isinstance(inner, faiss.IndexPreTransform) else inner)
    return max(getattr(inner, "nlist", 1), getattr(getattr(inner, "pq", None), "ksub", 1))


def _said(report: Report, before: str, work: Any) -> Any:
    """As `Report.attempt`, with the variant before the key."""
    try:
        return work()
    except SurfError as error:
        report.wrong("finetune", f"{before}{error}")
        return None
