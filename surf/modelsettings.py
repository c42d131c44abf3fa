"""The config's sections `embed` and `lvlm`: the two models."""

from typing import ClassVar, Literal

from pydantic import Field

from surf.prompts import LAYOUTS, RETRIEVAL_PROMPT, SYSTEM_PROMPT
from surf.sections import KNOB, Name, Positive, Section, Share


class Embed(Section):
    """CLIP image embeddings, by open_clip."""

    version: ClassVar[int] = 2
    model: Name = Field(default="ViT-L-14-quickgelu", description="open_clip model name, or local-dir:PATH.")
    pretrained: str | None = Field(default="openai", description="open_clip weights tag; null for local-dir models.")
    batch_size: Positive = Field(json_schema_extra=KNOB, default=512, description="Images a forward pass.")
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = Field(
        default="fp32",
        description="Arithmetic of the encoder. fp8: bf16, and the products of the image tower in 8 bits (Ada or Hopper).",
    )
    decode: Literal["exact", "draft", "gpu"] = Field(
        default="exact",
        description="draft: JPEG files are decoded at a half, a quarter or an eighth of their size where that is enough; "
        "gpu: by the GPU (nvJPEG), for jobs with few cores.",
    )
    gpu_share: Share = Field(
        default=1.0,
        description="Share of the JPEG files that decode: gpu leaves to the GPU; the others are decoded as by draft.",
    )
    workers: int = Field(
        json_schema_extra=KNOB, default=8, ge=0, description="Processes that read and decode images; 0: the job's own process."
    )
    compile: Literal["off", "default", "reduce-overhead", "max-autotune"] = Field(
        json_schema_extra=KNOB, default="off", description="Mode of torch.compile; it takes a while, once a job."
    )


class Lvlm(Section):
    """The vision-language model and its prompt: shared by answer, reanswer, finetune and evaluate."""

    model: Name = Field(default="llava-hf/llava-1.5-7b-hf", description="Hugging Face image-text-to-text model or path.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="bfloat16", description="Weights and arithmetic.")
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers", description="What answers. vllm must be installed beside surf: see docs/models.md."
    )
    layout: Literal[LAYOUTS] = Field(default="readme", description="How references stand in the prompt.")  # type: ignore[valid-type]
    system_prompt: str = Field(default=SYSTEM_PROMPT, description="System prompt without references.")
    retrieval_prompt: str = Field(default=RETRIEVAL_PROMPT, description="System prompt with references.")
    pad_to_square: bool | None = Field(
        default=None,
        description="Pad images to a square of the mean colour. null: as the model was trained (LLaVA-1.5: yes, others: no).",
    )
    caption_chars: Positive = Field(default=1200, description="Captions in prompts are cut to this many characters.")
    batch_tokens: Positive = Field(
        json_schema_extra=KNOB, default=65_536, description="Tokens in one batch, with padding and answers."
    )
    batch_size: Positive = Field(json_schema_extra=KNOB, default=512, description="Prompts in one forward pass, at most.")
    compile: bool = Field(
        json_schema_extra=KNOB,
        default=True,
        description="On a GPU, compile norms, activations and rotary positions to answer faster; takes seconds, once a job.",
    )
    parity_prompts: int = Field(
        json_schema_extra=KNOB,
        default=8,
        ge=0,
        description="With vllm: prompts that both engines answer at the start of a job, which loads both; 0 trusts vllm.",
    )
    parity_limit: Share = Field(
        json_schema_extra=KNOB,
        default=0.25,
        description="With vllm: share of these prompts that may be answered differently; above it the job stops.",
    )
