"""Training samples: the rows of `pairs` as texts, and texts and images as batches with labels."""

import logging
import os
import signal
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from surf import adapters, processing, prompts
from surf.config import Finetune, Images, Lvlm
from surf.errors import ImageError, SurfError
from surf.images import Images as ImageRoots
from surf.pair import ordered_references
from surf.training import packing
from surf.training.loss import IGNORED

log = logging.getLogger("surf")


@dataclass(frozen=True)
class Sample:
    """One training text. `answer_ids` are its last tokens: the answer and the end token, which alone bear loss."""

    round_id: str
    text: str
    images: tuple[str, ...]
    answer_ids: tuple[int, ...]
    length: int  # tokens, images counted in full
    image_tokens: int  # those of them that are images


def make_samples(
    rows: list[dict[str, Any]], processor: Any, finetune: Finetune, lvlm: Lvlm, images: Images, *, where: str = "pairs"
) -> tuple[list[Sample], int]:
    """Training texts of the rows of `pairs`, and how many rows were dropped because not even the question fits.

    Captions of a text longer than `finetune.max_tokens` are cut to half, and half again; a question or an answer never is.

    Raises:
        SurfError: nothing is left; an image cannot be opened.
    """
    samples = []
    cut = 0
    for row in rows:
        chars = lvlm.caption_chars
        sample = make_sample(row, processor, lvlm, images, finetune.verdict)
        while sample.length > finetune.max_tokens and chars:
            chars //= 2
            sample = make_sample(row, processor, lvlm.model_copy(update={"caption_chars": chars}), images, finetune.verdict)
        if sample.length > finetune.max_tokens:
            log.warning("round %s is dropped: %d tokens without any caption", row["round_id"], sample.length)
            continue
        cut += chars < lvlm.caption_chars
        samples.append(sample)
    dropped = len(rows) - len(samples)
    if not samples:
        what = f"none of its {len(rows)} rows fits into finetune.max_tokens = {finetune.max_tokens}"
        raise SurfError(what if rows else "has no rows", where=where, expected="at least one training sample")
    log.info("%d samples; captions cut to fit in %d, %d dropped", len(samples), cut, dropped)
    return samples, dropped


def make_sample(row: dict[str, Any], processor: Any, lvlm: Lvlm, images: Images, verdict: bool = False) -> Sample:
    """The training text of one row of `pairs`; with `verdict` it ends with a line that says which references are useful.

    Raises:
        SurfError: the row's kind is unknown, an image cannot be opened, or the tokens of the prompt are no prefix of those of
            the whole text.
    """
    prompt = prompts.from_options(row["question"], row["image"], references(row), lvlm)
    answer = prompts.clean(row["answer"])
    if verdict:
        answer = prompts.with_verdict(answer, [positive for positive, _ in _shown(row)])
    sizes = [(0, 0)] * len(prompt.images)
    if not adapters.of(processor).fixed:
        sizes = [_use("size", name, row["round_id"], images) for name in prompt.images]
    asked = prompts.chat(processor, prompt)
    text = processing.with_end(processor, prompts.chat(processor, prompt, answer))
    before, ids = (processing.token_ids(processor, processing.expand(processor, one, sizes, lvlm)) for one in (asked, text))
    if ids[: len(before)] != before or ids[-1] not in processor.tokenizer.added_tokens_decoder or len(ids) == len(before):
        raise SurfError(
            "the tokens of its prompt are not the first tokens of prompt and answer, so the answer cannot be told apart",
            where=f"round {row['round_id']}",
            expected="a chat template whose generation prompt ends where a token ends, and no answer that runs into it",
        )
    seen = sum(processing.image_tokens(processor, lvlm, size, len(sizes) == 1) for size in sizes)
    return Sample(row["round_id"], text, prompt.images, tuple(ids[len(before) :]), len(ids), seen)


def references(row: dict[str, Any]) -> list[prompts.Reference]:
    """The references of a row of `pairs`, in the order in which they stand in the prompt.

    Raises:
        SurfError: its kind is unknown, or other references are there than its kind says.
    """
    return [prompts.Reference(reference["image"], reference["caption"]) for _, reference in _shown(row)]


def _shown(row: dict[str, Any]) -> list[tuple[bool, dict[str, Any]]]:
    """(is it the positive one, reference) of those that the row's kind shows."""
    shown = {"pair": {True, False}, "positive_only": {True}, "negative_only": {False}, "no_reference": set()}.get(row["kind"])
    found = [(positive, reference) for positive, reference in ordered_references(row) if positive in (shown or ())]
    if shown is None or len(found) < len(shown):
        expected = "pair, positive_only, negative_only or no_reference, with its references"
        raise SurfError(f"kind {row['kind']!r}", where=f"round {row['round_id']}", expected=expected)
    return found


def collate(samples: list[Sample], *, processor: Any, lvlm: Lvlm, images: Images, packed: bool = False) -> dict[str, Any]:
    """A batch: `encode`'s tensors, padded on the right, and `labels` (samples, tokens) int64; or all in one row, `packed`.

    Raises:
        SurfError: an image cannot be used, or takes another number of tokens than a blank one of its size did.
    """
    import torch

    opened = [[_use("open", name, sample.round_id, images) for name in sample.images] for sample in samples]
    batch = processing.encode(processor, [sample.text for sample in samples], opened, padding_side="right", lvlm=lvlm)
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for number, sample in enumerate(samples):
        length = int(batch["attention_mask"][number].sum())
        place = slice(length - len(sample.answer_ids), length)
        labels[number, place] = torch.tensor(sample.answer_ids)
        if length != sample.length or not torch.equal(labels[number, place], batch["input_ids"][number, place]):
            what = f"has {length} tokens, {sample.length} were counted"
            raise SurfError(what, where=f"round {sample.round_id}", expected="a processor that counts as it encodes")
    whole = {**batch, "labels": labels}
    return packing.pack(whole) if packed else whole


def _use(what: Literal["open", "size"], name: str, round_id: str, images: Images) -> Any:
    try:
        return getattr(_roots(tuple(images.roots), images.max_pixels, os.getpid()), what)(name)
    except ImageError as error:
        where = f"image {name} of round {round_id}"
        raise SurfError(str(error), where=where, expected="a readable image", next="mend it, or remake the pairs") from None


@lru_cache(maxsize=2)
def _roots(roots: tuple[str, ...], max_pixels: int, pid: int) -> ImageRoots:
    """Opened once in each process (`pid` only keys the cache: open Parquet files must not be shared with a fork)."""
    from torch.utils.data import get_worker_info

    if get_worker_info():
        _outlive_signals()
    return ImageRoots(roots, max_pixels)


def _outlive_signals() -> None:
    """A signal to the whole job is the trainer's business, which still needs its batches; only the trainer ends a worker."""
    numbers = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def watch() -> None:
        while signal.sigwaitinfo(numbers).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
