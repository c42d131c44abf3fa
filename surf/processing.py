"""Texts and images into tensors: the one way for training and for answering.

The original resized and cropped images when it answered but padded them to squares when it trained. Here both sides call
`encode`.
"""

import logging
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from surf import prompts
from surf.config import Finetune, Images, Lvlm
from surf.errors import ImageError, SurfError
from surf.images import Images as ImageRoots

if TYPE_CHECKING:
    from PIL.Image import Image


log = logging.getLogger("surf")

_IGNORED = -100  # label of tokens without loss


@dataclass(frozen=True)
class Sample:
    """One training text. `answer_ids` are its last tokens: the answer and the end token, which alone bear loss."""

    round_id: str
    text: str
    images: tuple[str, ...]
    answer_ids: tuple[int, ...]
    length: int  # tokens, images counted in full


def load_processor(lvlm: Lvlm) -> Any:
    """The processor of `lvlm.model`, a folder or a name on the Hugging Face hub.

    Raises:
        SurfError: it cannot be loaded, or lacks a part that surf needs.
    """
    from transformers import AutoProcessor

    where = f"lvlm.model {lvlm.model}"
    try:
        processor = AutoProcessor.from_pretrained(lvlm.model)
    except (OSError, ValueError, KeyError) as error:
        what = f"its processor cannot be loaded ({str(error).strip().splitlines()[0]})"
        raise SurfError(what, where=where, expected="a Hugging Face image-text-to-text model or its folder") from None
    for part in ("tokenizer", "image_processor", "image_token", "chat_template"):
        if not getattr(processor, part, None):
            raise SurfError(f"its processor has no {part}", where=where, expected="a Hugging Face image-text-to-text model")
    if getattr(processor, "patch_size", 1) is None:
        raise SurfError("processor_config.json has no patch_size", where=where, expected="a LLaVA folder of transformers 5")
    if processor.tokenizer.eos_token is None:
        raise SurfError("its tokenizer has no end token", where=where)
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token  # padding is masked, so any token will do
    return processor


def square(image: "Image", background: tuple[int, ...]) -> "Image":
    """`image` in the middle of a square of colour `background` (0-255 each): LLaVA's `expand2square`, pixel for pixel."""
    from PIL import Image

    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    padded = Image.new(image.mode, (side, side), background)
    padded.paste(image, ((side - width) // 2, (side - height) // 2))
    return padded


def encode(
    processor: Any,
    texts: Sequence[str],
    images: Sequence[Sequence["Image"]],
    *,
    padding_side: Literal["left", "right"],
    lvlm: Lvlm,
) -> Any:
    """Rendered chats and their images as a model's inputs.

    Args:
        texts: from `prompts.chat`, with one image tag for each image.
        images: RGB images of each text, in the order of its tags. Numbers may differ from text to text.
        padding_side: left to generate, right to train.
        lvlm: the config's section; `pad_to_square` is used.

    Returns:
        A `BatchFeature` of torch tensors: `input_ids` and `attention_mask` (texts, tokens) int64, `pixel_values`
        (images of all texts in order, 3, height, width) float32, and whatever else the model's processor adds.

    Raises:
        SurfError: a text has another number of tags than images.
    """
    for text, own in zip(texts, images, strict=True):
        tags = text.count(processor.image_token)
        if tags != len(own):
            raise SurfError(f"a text has {tags} image tags for {len(own)} images", where=repr(text[-80:]))
    flat = [image for own in images for image in own]
    if lvlm.pad_to_square:
        background = tuple(int(mean * 255) for mean in processor.image_processor.image_mean)
        flat = [square(image, background) for image in flat]
    return processor(
        text=list(texts),
        images=flat or None,
        padding=True,
        padding_side=padding_side,
        add_special_tokens=_lacks_bos(processor, texts),
        return_tensors="pt",
    )


def token_ids(processor: Any, text: str) -> list[int]:
    """Token ids of a rendered chat, as `encode` makes them, but with one token for each image."""
    ids = processor.tokenizer(text, add_special_tokens=_lacks_bos(processor, [text]), verbose=False)["input_ids"]
    return list(ids)


def with_end(processor: Any, text: str) -> str:
    """A rendered chat that closes with the end token: the answer's last token, which a model must learn to write.

    Some templates write a line break behind it, which is cut; LLaVA-1.5's own writes none at all, so it is added.
    """
    end = processor.tokenizer.eos_token
    head, found, tail = text.rpartition(end)
    return head + end if found and not tail.strip() else text.rstrip() + end


def image_tokens(processor: Any, lvlm: Lvlm) -> int:
    """Tokens that one image takes in the prompt (576 for LLaVA-1.5), counted on a blank one."""
    from PIL import Image

    blank = encode(processor, [processor.image_token], [[Image.new("RGB", (64, 64))]], padding_side="right", lvlm=lvlm)
    return int((blank["input_ids"] == processor.image_token_id).sum())


def _lacks_bos(processor: Any, texts: Sequence[str]) -> bool:
    """Whether the tokenizer shall add its special tokens: not if the chat template has written the first one already."""
    bos = processor.tokenizer.bos_token
    return bos is None or not all(text.startswith(bos) for text in texts)


# --- training samples --------------------------------------------------------------------------------------------------


def make_samples(
    rows: list[dict[str, Any]], processor: Any, finetune: Finetune, lvlm: Lvlm, *, where: str = "pairs"
) -> tuple[list[Sample], int]:
    """Training texts of the rows of `pairs`, and how many rows were dropped because not even the question fits.

    Captions of a text longer than `finetune.max_tokens` are cut to half, and half again; a question or an answer never is.

    Raises:
        SurfError: nothing is left.
    """
    per_image = image_tokens(processor, lvlm)
    samples = []
    cut = 0
    for row in rows:
        chars = lvlm.caption_chars
        sample = make_sample(row, processor, lvlm, per_image)
        while sample.length > finetune.max_tokens and chars:
            chars //= 2
            sample = make_sample(row, processor, lvlm.model_copy(update={"caption_chars": chars}), per_image)
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


def make_sample(row: dict[str, Any], processor: Any, lvlm: Lvlm, per_image: int) -> Sample:
    """The training text of one row of `pairs`; an image takes `per_image` tokens.

    Raises:
        SurfError: the row's kind is unknown, or the tokens of the prompt are no prefix of those of the whole text.
    """
    prompt = prompts.from_options(row["question"], row["image"], _references(row), lvlm)
    asked = prompts.chat(processor, prompt)
    text = with_end(processor, prompts.chat(processor, prompt, prompts.clean(row["answer"])))
    before, ids = token_ids(processor, asked), token_ids(processor, text)
    if ids[: len(before)] != before or ids[-1] != processor.tokenizer.eos_token_id or len(ids) == len(before):
        raise SurfError(
            "the tokens of its prompt are not the first tokens of prompt and answer, so the answer cannot be told apart",
            where=f"round {row['round_id']}",
            expected="a chat template whose generation prompt ends where a token ends, and no answer that runs into it",
        )
    length = len(ids) + len(prompt.images) * (per_image - 1)
    return Sample(row["round_id"], text, prompt.images, tuple(ids[len(before) :]), length)


def _references(row: dict[str, Any]) -> list[prompts.Reference]:
    order = ["positive", "negative"] if row["positive_first"] else ["negative", "positive"]
    kinds = {"pair": order, "positive_only": ["positive"], "negative_only": ["negative"], "no_reference": []}
    if row["kind"] not in kinds or any(row[side] is None for side in kinds[row["kind"]]):
        expected = f"one of {', '.join(kinds)}, with its references"
        raise SurfError(f"kind {row['kind']!r}", where=f"round {row['round_id']}", expected=expected)
    return [prompts.Reference(row[side]["image"], row[side]["caption"]) for side in kinds[row["kind"]]]


def collate(samples: list[Sample], *, processor: Any, lvlm: Lvlm, images: Images) -> dict[str, Any]:
    """A batch: `encode`'s tensors, padded on the right, and `labels` (samples, tokens) int64.

    Raises:
        SurfError: an image cannot be used, or takes another number of tokens than a blank one did.
    """
    import torch

    opened = [[_open(name, sample, images) for name in sample.images] for sample in samples]
    batch = encode(processor, [sample.text for sample in samples], opened, padding_side="right", lvlm=lvlm)
    labels = torch.full_like(batch["input_ids"], _IGNORED)
    for number, sample in enumerate(samples):
        length = int(batch["attention_mask"][number].sum())
        place = slice(length - len(sample.answer_ids), length)
        labels[number, place] = torch.tensor(sample.answer_ids)
        if length != sample.length or not torch.equal(labels[number, place], batch["input_ids"][number, place]):
            what = f"has {length} tokens, {sample.length} were counted"
            raise SurfError(what, where=f"round {sample.round_id}", expected="a model with a fixed number of tokens an image")
    return {**batch, "labels": labels}


def _open(name: str, sample: Sample, images: Images) -> Any:
    try:
        return _roots(tuple(images.roots), images.max_pixels, os.getpid()).open(name)
    except ImageError as error:
        where = f"image {name} of round {sample.round_id}"
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
