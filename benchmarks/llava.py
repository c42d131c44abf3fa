"""A LLaVA-1.5 with random weights at real size, its processor, and photographs that nobody took."""

import io
from typing import Any

from surf.shards import stable_hash

WORDS = 31_000  # w0, w1, …: one token each


class Pictures:
    """`Images` whose names are numbers; JPEG bytes in memory, few different ones."""

    def __init__(self) -> None:
        import numpy as np
        from PIL import Image

        draw = np.random.default_rng(0)
        self.files = []
        for _ in range(32):
            small = Image.fromarray(draw.integers(0, 255, (24, 32, 3), dtype=np.uint8))
            self.files.append(io.BytesIO())
            small.resize((640, 480), Image.Resampling.BICUBIC).save(self.files[-1], "JPEG", quality=90)

    def open(self, name: str) -> Any:
        """The decoded image."""
        from PIL import Image

        file = self.files[stable_hash(name) % len(self.files)]
        return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def build(tiny: bool) -> tuple[Any, Any]:
    """(model, processor) with random weights: LLaVA-1.5-7B's sizes, or tiny ones."""
    import torch
    from transformers import (
        AutoModelForImageTextToText,
        CLIPImageProcessor,
        CLIPVisionConfig,
        GenerationConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaProcessor,
    )

    side, patch = (56, 14) if tiny else (336, 14)
    tokenizer = _tokenizer()
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for m in messages %}{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: '}.get(m['role'], '') }}"
            "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %} "
            "{% endfor %}"
            "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
        ),
    )
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4} if tiny else {}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    full = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    whole = LlavaConfig(
        # LlamaConfig's own sizes are those of the 7B model
        text_config=LlamaConfig(vocab_size=32_064, max_position_embeddings=4096, **text, **special),
        vision_config=CLIPVisionConfig(**(tower if tiny else full), image_size=side, patch_size=patch),
        image_token_id=processor.image_token_id,
        image_seq_length=(side // patch) ** 2,
        **special,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if tiny else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(whole, dtype=dtype, attn_implementation="sdpa")
    model.generation_config = GenerationConfig(**special)
    return model.eval(), processor


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *(f"w{number}" for number in range(WORDS))]
    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
