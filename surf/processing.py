"""Texts and images into tensors: the one way for training and for answering.

The original resized and cropped images when it answered but padded them to squares when it trained. Here both sides call
`encode`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from surf.config import Lvlm
from surf.errors import SurfError

if TYPE_CHECKING:
    from PIL.Image import Image


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


def tokens(processor: Any, texts: Sequence[str]) -> list[list[int]]:
    """`token_ids` of many texts at once, which takes less time."""
    if not texts:
        return []
    made = processor.tokenizer(list(texts), add_special_tokens=_lacks_bos(processor, texts), verbose=False)
    return [list(ids) for ids in made["input_ids"]]


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
