"""What single families of models need beyond what their processor says of itself. Most need nothing: see docs/models.md."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Adapter:
    """How one family is asked and trained."""

    literal: bool | None = None
    """True: the prompt goes into the chat template as one text with the image tags in it. False: as parts, and the template
    writes the tags. None: as text if the tag is `<image>` itself."""

    square: bool = False
    """Images are padded to squares where `lvlm.pad_to_square` is null: the family was trained so."""

    fixed: bool = False
    """Every image takes equally many tokens, whatever its size."""

    packs: bool = True
    """Samples can be trained one behind the other in one row: attention is causal, positions simply count."""


# by the name of the processor's class
ADAPTERS = {
    "LlavaProcessor": Adapter(literal=True, square=True, fixed=True),  # its template would move all images to the front
    "LlavaOnevisionProcessor": Adapter(literal=True),  # its template too
    "Idefics3Processor": Adapter(literal=False),  # its template looks at the first part
    "SmolVLMProcessor": Adapter(literal=False),
    "Qwen2_5_VLProcessor": Adapter(packs=False),  # positions in three dimensions
    "Gemma3Processor": Adapter(packs=False),  # the tokens of one image see each other
}


def of(processor: Any) -> Adapter:
    """The adapter of a processor's family."""
    return ADAPTERS.get(type(processor).__name__, Adapter())
