"""Texts and images into tensors: the one way for training and for answering.

The original resized and cropped images when it answered but padded them to squares when it trained. Here both sides call
`encode`. How many tokens an image takes is the processor's business alone: it is asked, with a blank image of the same size.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from surf import adapters, prompts
from surf.config import Lvlm
from surf.errors import SurfError

if TYPE_CHECKING:
    from PIL.Image import Image

    from surf.images import Images
    from surf.models import Request

log = logging.getLogger("surf")
LONGEST = 32_768  # tokens of a prompt with its answer: an engine sets memory aside for one such
# A fast tokenizer keeps its padding as a state, which another thread's call would change between two steps of this one's.
_TOKENIZER = threading.Lock()


def load_processor(lvlm: Lvlm) -> Any:
    """The processor of `lvlm.model`, a folder or a name on the Hugging Face hub.

    Raises:
        SurfError: it cannot be loaded, or lacks a part that surf needs.
    """
    from transformers import AutoProcessor

    where = f"lvlm.model {lvlm.model}"
    try:
        processor = AutoProcessor.from_pretrained(lvlm.model)
    except (OSError, ValueError, KeyError, ImportError) as error:  # ImportError: SmolVLM's needs num2words, and says so
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
    _check_template(processor, where)
    return processor


def _check_template(processor: Any, where: str) -> None:
    """Refuse a chat template that moves images away from the words that they belong to, or loses words."""
    words = ["first", "second", "third", "fourth"]
    prompt = prompts.Prompt("Be kind.", f" {prompts.IMAGE} ".join(words), ("", "", ""))
    pieces = prompts.chat(processor, prompt).split(processor.image_token)
    if len(pieces) != len(words) or not all(word in piece for word, piece in zip(words, pieces, strict=True)):
        what = "its chat template does not keep images and words in their order"
        expected = "a template that interleaves, or literal=True in the model's adapter (docs/models.md)"
        raise SurfError(what, where=where, expected=expected)


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
    opened = [[squared(processor, image, lvlm) for image in own] for own in images]
    with _TOKENIZER:
        return processor(
            text=list(texts),
            images=opened if any(opened) else None,  # nested: some models treat several images of one text in another way
            padding=True,
            padding_side=padding_side,
            add_special_tokens=_lacks_bos(processor, texts),
            return_tensors="pt",
        )


def pixels(processor: Any, image: "Image", lvlm: Lvlm) -> Any:
    """What `encode` makes of one image, where the processor makes one tensor of each: float32 [3, height, width].

    No tokenizer takes part, so threads may call it side by side.
    """
    made = processor.image_processor(images=[squared(processor, image, lvlm)], return_tensors="pt")
    return made["pixel_values"][0]


def squared(processor: Any, image: "Image", lvlm: Lvlm) -> "Image":
    """The image as the model gets to see it: padded to a square, or as it is."""
    if not (adapters.of(processor).square if lvlm.pad_to_square is None else lvlm.pad_to_square):
        return image
    return square(image, tuple(int(mean * 255) for mean in processor.image_processor.image_mean))


def expand(processor: Any, text: str, sizes: Sequence[tuple[int, int]], lvlm: Lvlm) -> str:
    """A rendered chat with the image tags written out, as the processor does it before it tokenizes.

    Args:
        sizes: (width, height) in pixels of the images, in the order of the tags.
    """
    pieces = text.split(processor.image_token)
    alone = len(sizes) == 1
    written = [_stand_in(processor, *_seen(processor, size, lvlm), alone) for size in sizes]
    return "".join(piece + one for piece, one in zip(pieces, [*written, ""], strict=True))


def image_tokens(processor: Any, lvlm: Lvlm, size: tuple[int, int] = (64, 64), alone: bool = True) -> int:
    """Tokens that an image of `size` (width, height) takes in the prompt, with its marks (576 for LLaVA-1.5).

    `alone`: it is the only image of its prompt.
    """
    return _count(processor, *_seen(processor, size, lvlm), alone)


def _seen(processor: Any, size: tuple[int, int], lvlm: Lvlm) -> tuple[int, int]:
    """The size of an image as the model gets to see it; one size for all where it does not matter."""
    adapter = adapters.of(processor)
    if adapter.fixed:
        return 64, 64
    square = adapter.square if lvlm.pad_to_square is None else lvlm.pad_to_square
    return (max(size), max(size)) if square else size


@lru_cache(maxsize=100_000)
def _stand_in(processor: Any, width: int, height: int, alone: bool) -> str:
    """What the processor writes instead of an image tag. Other images of the prompt do not matter, but that there are some."""
    from PIL import Image

    blanks = [Image.new("RGB", (width, height))] * (1 if alone else 2)
    text = processor.image_token * len(blanks)
    with _TOKENIZER:
        made = processor(text=[text], images=[blanks], return_text_replacement_offsets=True)
    return str(made["text_replacement_offsets"][0][0]["replacement"])


@lru_cache(maxsize=100_000)
def _count(processor: Any, width: int, height: int, alone: bool) -> int:
    text = _stand_in(processor, width, height, alone)
    with _TOKENIZER:
        return len(processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def token_ids(processor: Any, text: str) -> list[int]:
    """Token ids of a rendered chat, as `encode` makes them, but with one token for each image."""
    return tokens(processor, [text])[0]


def tokens(processor: Any, texts: Sequence[str]) -> list[list[int]]:
    """`token_ids` of many texts at once, which takes less time."""
    if not texts:
        return []
    with _TOKENIZER:
        made = processor.tokenizer(list(texts), add_special_tokens=_lacks_bos(processor, texts), verbose=False)
    return [list(ids) for ids in made["input_ids"]]


def with_end(processor: Any, text: str) -> str:
    """A rendered chat that closes with the end token: the answer's last token, which a model must learn to write.

    That is the special token by which the template ends a turn (ChatML's <|im_end|>, Gemma's <end_of_turn>). Some templates
    write a line break behind it, which is cut; LLaVA-1.5's own writes no token at all, so the tokenizer's is added.
    """
    text = text.rstrip()
    return text if text.endswith(_marks(processor)) else text + processor.tokenizer.eos_token


def answered(
    processor: Any, asked: Sequence[prompts.Prompt], golds: Sequence[str]
) -> tuple[list[str], list[list[int]], list[int]]:
    """(chats closed with the gold answer, their `tokens`, how many of these are the answer and its end token)."""
    before = tokens(processor, [prompts.chat(processor, prompt) for prompt in asked])
    texts = [prompts.chat(processor, prompt, prompts.clean(gold)) for prompt, gold in zip(asked, golds, strict=True)]
    whole = [with_end(processor, text) for text in texts]
    ids = tokens(processor, whole)
    return whole, ids, [len(own) - len(first) for own, first in zip(ids, before, strict=True)]


def fitted(
    processor: Any, requests: Sequence["Request"], lvlm: Lvlm, images: "Images", context: int, new: Sequence[int]
) -> tuple[list["Request"], list[str], list[list[int]]]:
    """(the requests, their rendered chats, the `tokens` of these).

    Captions of those that do not fit into the model's context are cut to half, and half again; a question never is.

    Args:
        context: tokens that the model takes, see `context_of`.
        new: tokens of each answer, at most.

    Raises:
        SurfError: a prompt does not fit without any caption.
    """

    def rendered(prompt: prompts.Prompt) -> tuple[str, list[int], int]:
        """Text, ids, and their number with all images."""
        text = prompts.chat(processor, prompt)
        own = token_ids(processor, text)
        return text, own, len(own) + prompt_image_tokens(processor, prompt.images, lvlm, images)

    made = list(requests)
    texts = [prompts.chat(processor, request.prompt) for request in made]
    ids = tokens(processor, texts)
    cut = 0
    for row, request in enumerate(made):
        room, chars = context - new[row], lvlm.caption_chars
        length = len(ids[row]) + prompt_image_tokens(processor, request.prompt.images, lvlm, images)
        while length > room:
            if not chars or not request.shorter:
                raise SurfError(
                    f"it takes {length} tokens without captions, and its answer up to {new[row]}",
                    where=f"the prompt of {request.prompt.images[-1:]}, {request.prompt.text[-80:]!r}",
                    expected=f"at most {context} together, which is the model's context",
                    next="show fewer references (evaluate.methods), lower max_new_tokens, or leave that row out of the data",
                )
            chars //= 2
            made[row] = replace(request, prompt=request.shorter(chars))
            texts[row], ids[row], length = rendered(made[row].prompt)
        cut += made[row] is not request
    if cut:
        log.info("captions of %d prompts were cut further, to fit into the model's %d tokens", cut, context)
    return made, texts, ids


def answer_tokens(processor: Any, golds: Sequence[str]) -> list[int]:
    """Tokens of each answer with its end; one more for what may join at its beginning."""
    return [len(ids) + 2 for ids in tokens(processor, [prompts.clean(gold) for gold in golds])]


def context_of(network: Any) -> int:
    """Tokens that a model takes, from its config; of very long contexts a part that suffices."""
    return min(getattr(network.get_text_config(), "max_position_embeddings", LONGEST), LONGEST)


def prompt_image_tokens(processor: Any, names: Sequence[str], lvlm: Lvlm, images: "Images") -> int:
    """Tokens of a prompt's images, less one tag each."""
    if adapters.of(processor).fixed:
        return len(names) * (image_tokens(processor, lvlm) - 1)
    sizes = [images.size(name) for name in names]
    return sum(image_tokens(processor, lvlm, size, len(names) == 1) - 1 for size in sizes)


def end_id(processor: Any) -> int:
    """The end token's id."""
    probe = prompts.Prompt("", f"{prompts.IMAGE}\nWhat?", ("",))
    return token_ids(processor, with_end(processor, prompts.chat(processor, probe, "This.")))[-1]


def stop_at_end(model: Any, processor: Any) -> None:
    """Let the end token of training stop the generation too: it need not be the tokenizer's own."""
    known = model.generation_config.eos_token_id
    ids = list(known) if isinstance(known, list) else [] if known is None else [known]
    if end_id(processor) not in ids:
        model.generation_config.eos_token_id = [*ids, end_id(processor)]


@lru_cache(maxsize=4)
def _marks(processor: Any) -> tuple[str, ...]:
    return tuple(token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special)


def _lacks_bos(processor: Any, texts: Sequence[str]) -> bool:
    """Whether the tokenizer shall add its special tokens: not if the chat template has written the first one already."""
    bos = processor.tokenizer.bos_token
    return bos is None or not all(text.startswith(bos) for text in texts)
