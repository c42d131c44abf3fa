"""Tiny models of the families that docs/models.md lists: their own config classes and processors, random weights.

    python tests/families.py FAMILY FOLDER

The chat templates are short, and do what the published ones do about images, a system role and the end of a turn.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny

HIDDEN = 64
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
SIGLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

_PARTS = "{%- for part in content %}{{ %s if part['type'] == 'image' else part['text'] }}{% endfor %}"
_CHATML = (
    "{%- for message in messages -%}{%- set content = message['content'] -%}<|im_start|>{{ message['role'] + '\n' }}"
    "{%- if content is string %}{{ content }}{% else -%}BODY{% endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"
)
# LLaVA-OneVision writes all images of a turn before its text
ONEVISION = _CHATML.replace(
    "BODY",
    "{%- for part in content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor -%}"
    "{%- for part in content | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor -%}",
)
QWEN = _CHATML.replace("BODY", _PARTS.replace("%s", "'<|vision_start|><|image_pad|><|vision_end|>'"))
INTERNVL = _CHATML.replace("BODY", _PARTS.replace("%s", "'<IMG_CONTEXT>\n'"))
IDEFICS = (
    "<|im_start|>{%- for message in messages -%}{%- set content = message['content'] -%}{{ message['role'] | capitalize }}"
    "{{- ':' if content[0]['type'] == 'image' else ': ' }}" + _PARTS.replace("%s", "'<image>'") + "{{ '<end_of_utterance>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt %}Assistant:{% endif -%}"
)
# Gemma 3 has no system role: the text goes to the head of the user's turn
GEMMA = (
    "{{ bos_token }}{%- set first = '' -%}{%- for message in messages -%}{%- set content = message['content'] -%}"
    "{%- if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{%- for part in content %}{{ '<start_of_image>' if part['type'] == 'image' else part['text'] | trim }}{% endfor -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif -%}"
)


def llava_onevision() -> tuple[Any, Any]:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tokenizer = _chatml(image_token="<image>", video_token="<video>")
    grid = [[32, 32], [32, 64], [64, 32], [64, 64]]
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=grid),
        tokenizer,
        LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION,
    )
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**SIGLIP, image_size=32, patch_size=16, vision_use_head=False),
        text_config=Qwen2Config(**TEXT, **_ids(tokenizer)),
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=grid,
    )
    return LlavaOnevisionForConditionalGeneration, (config, processor)


def qwen2_5_vl() -> tuple[Any, Any]:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    marks = {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    tokenizer = _chatml(image_token="<|image_pad|>", video_token="<|video_pad|>", **marks)
    pixels = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**pixels), tokenizer, Qwen2VLVideoProcessor(**pixels), chat_template=QWEN
    )
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            **_ids(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 8,
            "window_size": 32,
            "out_hidden_size": HIDDEN,
            "fullatt_block_indexes": [1],
        },
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration, (config, processor)


def idefics3() -> tuple[Any, Any]:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessor, Idefics3Processor

    return Idefics3ForConditionalGeneration, _idefics(Idefics3Config, Idefics3ImageProcessor, Idefics3Processor)


def smolvlm() -> tuple[Any, Any]:
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    video = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    video_processor = SmolVLMVideoProcessor(**video, num_frames=1, fps=1)
    return SmolVLMForConditionalGeneration, _idefics(SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor, video_processor)


def _idefics(config_class: Any, images_class: Any, processor_class: Any, *video_processor: Any) -> tuple[Any, Any]:
    tiles = {f"tile_{row}_{column}": f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)}
    marks = {"global_image_token": "<global-img>", "fake_image_token": "<fake_token_around_image>"}
    tokenizer = tiny.build_tokenizer(
        bos="<|im_start|>", eos="<end_of_utterance>", more={"image_token": "<image>", **marks, **tiles}
    )
    images = images_class(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = processor_class(images, tokenizer, *video_processor, image_seq_len=4, chat_template=IDEFICS)
    config = config_class(
        vision_config={**SIGLIP, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **TEXT, **_ids(tokenizer)},
        image_token_id=processor.image_token_id,
        scale_factor=2,
    )
    return config, processor


def internvl() -> tuple[Any, Any]:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        InternVLVisionConfig,
        Qwen2Config,
    )

    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = _chatml(**marks, video_token="<video>")
    side = {"size": {"height": 32, "width": 32}}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(**side, crop_to_patches=True, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(**side),
        image_seq_length=4,
        chat_template=INTERNVL,
    )
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**SIGLIP, image_size=[32, 32], patch_size=[8, 8]),
        text_config=Qwen2Config(**TEXT, **_ids(tokenizer)),
        image_token_id=processor.image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration, (config, processor)


def gemma3() -> tuple[Any, Any]:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    marks = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    turns = {"start_of_turn": "<start_of_turn>", "end_of_turn": "<end_of_turn>"}
    tokenizer = tiny.build_tokenizer(bos="<bos>", eos="<eos>", more={**marks, **turns})
    images = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    processor = Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=GEMMA)
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**TEXT, **_ids(tokenizer), head_dim=16, query_pre_attn_scalar=16, sliding_window=64),
        vision_config=SiglipVisionConfig(**SIGLIP, image_size=32, patch_size=8),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=processor.image_token_id,
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        tie_word_embeddings=True,
    )
    return Gemma3ForConditionalGeneration, (config, processor)


def _chatml(**more: str) -> Any:
    return tiny.build_tokenizer(bos=None, eos="<|im_end|>", more={"turn_token": "<|im_start|>", **more})


def _ids(tokenizer: Any) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava-onevision": llava_onevision,
    "qwen2.5-vl": qwen2_5_vl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "internvl": internvl,
    "gemma3": gemma3,
}


def build(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny model of `family` and its processor into `folder`; "llava" is LLaVA-1.5."""
    import torch
    from transformers import GenerationConfig

    if family == "llava":
        return tiny.build_lvlm(folder, seed)
    model_class, (config, processor) = FAMILIES[family]()
    torch.manual_seed(seed)
    model = model_class(config)
    model.generation_config = GenerationConfig(eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]))
