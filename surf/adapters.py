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

    packs: bool = False
    """Samples can be trained one behind the other in one row: attention is causal, positions simply count."""

    lean: bool = False
    """The logits are the output embeddings of `model.model`'s last hidden state and nothing else, so that those without loss
    need not be computed."""


# By the name of the processor's class. A family that is not here is taken to be the plainest, and trained the plain way.
ADAPTERS = {
    "LlavaProcessor": Adapter(literal=True, square=True, fixed=True, packs=True, lean=True),  # its template moves images
    "LlavaOnevisionProcessor": Adapter(literal=True, packs=True, lean=True),  # its template too
    "Idefics3Processor": Adapter(literal=False, packs=True, lean=True),  # its template looks at the first part
    "SmolVLMProcessor": Adapter(literal=False, packs=True, lean=True),
    "InternVLProcessor": Adapter(packs=True, lean=True),
    "Qwen2_5_VLProcessor": Adapter(lean=True),  # positions in three dimensions
    "Gemma3Processor": Adapter(lean=True),  # the tokens of one image see each other
}


def of(processor: Any) -> Adapter:
    """The adapter of a processor's family."""
    return ADAPTERS.get(type(processor).__name__, Adapter())
