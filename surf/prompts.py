"""The one prompt builder: first answers, re-answers, training and evaluation all come through here.

A prompt is a text with `<image>` tags and as many images, in the order of the tags. The query image is always the last one,
and the references stand in the user's turn. `chat` turns it into the model's own chat format.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from surf import adapters
from surf.errors import SurfError

IMAGE = "<image>"

# LLaVA-1.5's system prompt, and the sentence that the original's release adds where there are references.
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
RETRIEVAL_PROMPT = (
    SYSTEM_PROMPT + " There may be some helpful information in the retrieved image-caption pairs, "
    "the assistant can refer to them before answering a question."
)

# The original's layouts; they do not agree with each other, so each has a name.
#   readme       the training sample of its README (the default)
#   figure       figure 3 of the paper, with <SEP>
#   filter       its data filter
#   evaluation   its POPE script: a blank, and no line break, before the question
#   image_only   its re-answer prompt: one reference image, no caption
LAYOUTS = ("readme", "figure", "filter", "evaluation", "image_only")

# What would let a caption close the reference block, add an image or end the turn, in any of the tested families.
_TAGS = re.compile(
    r"<\s*/?\s*(?:retrieval|image|sep|s|unk|pad|bos|eos|think|img|img_context|video|global-img|row_\d+_col_\d+|image_soft_token"
    r"|fake_token_around_image|end_of_utterance|(?:start|end)_of_(?:turn|image))\s*/?\s*>"
    r"|<\|[^<>|]{0,40}\|>|\[/?INST\]|<</?SYS>>",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Reference:
    """A retrieved image-caption pair."""

    image: str
    caption: str


@dataclass(frozen=True)
class Prompt:
    """One user turn: `text` holds as many `<image>` tags as there are `images` (names, in the order of the tags)."""

    system: str
    text: str
    images: tuple[str, ...]

    def __post_init__(self) -> None:
        tags = self.text.count(IMAGE)
        if tags != len(self.images):
            raise SurfError(f"a prompt has {tags} <image> tags for {len(self.images)} images", where=repr(self.text[:80]))


def build(
    question: str,
    image: str,
    references: Sequence[Reference] = (),
    *,
    layout: str = "readme",
    system_prompt: str = SYSTEM_PROMPT,
    retrieval_prompt: str = RETRIEVAL_PROMPT,
    caption_chars: int = 1200,
    show: str = "both",
) -> Prompt:
    """The prompt for one question on one image.

    Args:
        question: the question, without `<image>` tag.
        image: name of the query image.
        references: most similar first, or in whatever order they shall stand; none gives the plain LLaVA prompt.
        layout: one of `LAYOUTS`.
        caption_chars: captions are cut at a word boundary to this many characters; questions never are.
        show: what is shown of a reference: both, caption or image.
    """
    question = clean(question)
    if not references:
        return Prompt(system_prompt, f"{IMAGE}\n{question}", (image,))
    if layout == "image_only" and show == "caption":
        raise SurfError("layout image_only shows no captions", expected="another lvlm.layout, or a method that shows images")
    captions = [cut(clean(reference.caption), caption_chars) for reference in references]
    shown = [{"both": f"{IMAGE} {caption}", "caption": caption, "image": IMAGE}[show] for caption in captions]
    images = [reference.image for reference in references if show != "caption"]
    return Prompt(retrieval_prompt, _LAYOUT[layout](shown, question), (*images, image))


def from_options(question: str, image: str, references: Sequence[Reference], lvlm: Any, show: str = "both") -> Prompt:
    """`build` with the settings of the config's `lvlm` section."""
    return build(
        question,
        image,
        references,
        layout=lvlm.layout,
        system_prompt=lvlm.system_prompt,
        retrieval_prompt=lvlm.retrieval_prompt,
        caption_chars=lvlm.caption_chars,
        show=show,
    )


def relevance(question: str) -> str:
    """Asks the model itself whether a reference is relevant to a question, to be answered with yes or no.

    The idea is RagVL's pointwise reranker (Chen et al. 2024, arXiv 2407.21439); the words are ours.
    """
    return (
        f"Would the retrieved image-caption pair help to answer the following question about the last image?\n"
        f"{question}\nAnswer with yes or no."
    )


def clean(text: str) -> str:
    """Text that cannot pose as markup: prompt tags and control characters are taken out, line breaks stay.

    Repeats until nothing changes, so that `<im<image>age>` does not leave a tag behind.
    """
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    while True:
        stripped = _TAGS.sub(" ", text)
        if stripped == text:
            return text.strip()
        text = stripped


_VERDICT = re.compile(r"\n\s*References:(?P<list>[^\n]*)$")


def with_verdict(answer: str, useful: Sequence[bool]) -> str:
    """The answer and a last line that says of each reference, in their order in the prompt, whether it was useful."""
    if not useful:
        return answer
    said = (f"{number} {'useful' if one else 'not useful'}" for number, one in enumerate(useful, 1))
    return f"{answer}\nReferences: {', '.join(said)}"


def split_verdict(text: str) -> tuple[str, list[bool]]:
    """The answer without the line of `with_verdict`, and what the line says; a line that was cut off is taken off as well."""
    if found := _VERDICT.search(text):
        said = re.findall(r"\b\d+ (not )?useful\b", found["list"])
        return text[: found.start()].rstrip(), [not word for word in said]
    head, _, last = text.rpartition("\n")
    if head and len(last) >= 3 and "References:".startswith(last):
        return head.rstrip(), []
    return text, []


def cut(text: str, limit: int) -> str:
    """At most `limit` characters, cut after a word where there is one."""
    if len(text) <= limit:
        return text
    head = text[:limit]
    if not text[limit].isspace():  # the limit falls inside a word: leave that word out, unless it is the first
        head = re.sub(r"(?<=\S)\s+\S*$", "", head)
    return head.rstrip()


def chat(processor: Any, prompt: Prompt, answer: str | None = None) -> str:
    """The prompt in the model's own chat format, ready for the processor; with `answer`, the whole training text.

    Where the model's image tag is `<image>` itself the text goes in as it stands: LLaVA's own template would move all
    images to the front and tear the numbered references apart. Other models get interleaved parts. A template that knows no
    system role, or leaves it out, gets the system prompt at the head of the user's turn.

    Raises:
        SurfError: the template can do neither.
    """
    literal = adapters.of(processor).literal
    tag = getattr(processor, "image_token", IMAGE)
    parts: list[dict[str, str]] = []
    if tag == IMAGE if literal is None else literal:
        parts = [{"type": "text", "text": prompt.text.replace(IMAGE, tag)}]
    else:
        for number, piece in enumerate(prompt.text.split(IMAGE)):
            if number:
                parts.append({"type": "image"})
            if piece:
                parts.append({"type": "text", "text": piece})
    asked: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    headed = [{"role": "user", "content": [{"type": "text", "text": f"{prompt.system}\n\n"}, *parts]}]
    if prompt.system:
        asked.insert(0, {"role": "system", "content": [{"type": "text", "text": prompt.system}]})
    replied = [] if answer is None else [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    error: Exception | None = None
    for messages in (asked, headed) if prompt.system else (asked,):
        try:
            text = str(processor.apply_chat_template(messages + replied, add_generation_prompt=not replied, tokenize=False))
        except (TemplateError, TypeError) as found:  # raise_exception('System role not supported'), 'USER: ' + a list
            error = found
            continue
        if prompt.system.strip() in text:
            return text
    what = f"fails ({error})" if error else "leaves out the system prompt, and the head of the user's turn"
    raise SurfError(f"the model's chat template {what}", expected="a template for messages with text and image parts")


def _numbered(shown: Sequence[str], end: str) -> str:
    return "".join(f"{number}. {one}{end}" for number, one in enumerate(shown, 1))


def _readme(shown: Sequence[str], question: str) -> str:
    return f"<Retrieval>{_numbered(shown, f' {chr(10)}')}</Retrieval> {IMAGE}\n{question}"


def _figure(shown: Sequence[str], question: str) -> str:
    return f"<Retrieval>{'<SEP>'.join(shown)}</Retrieval> {IMAGE}\n{question}"


def _filter(shown: Sequence[str], question: str) -> str:
    return f"<Retrieval> {_numbered(shown, chr(10)).rstrip(chr(10))} </Retrieval>\n{IMAGE}\n{question}"


def _evaluation(shown: Sequence[str], question: str) -> str:
    return f"<Retrieval> {_numbered(shown, chr(10))} </Retrieval>\n{IMAGE} {question}"


def _image_only(shown: Sequence[str], question: str) -> str:
    if len(shown) != 1:
        raise SurfError(f"layout image_only takes one reference, not {len(shown)}", expected="another lvlm.layout")
    return (
        f"Here is a image similar to the test image:\n{IMAGE}\n"
        f"Based on this image and the test image:\n{IMAGE}\nAnswer the question: {question}"
    )


_LAYOUT = {"readme": _readme, "figure": _figure, "filter": _filter, "evaluation": _evaluation, "image_only": _image_only}
