"""A tiny LLaVA with random weights, for tests. As a program it writes one: `python tests/tiny.py FOLDER`."""

import random
import sys
from pathlib import Path

SENTENCES = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "There may be some helpful information in the retrieved image-caption pairs, "
    "the assistant can refer to them before answering a question.",
    "USER: ASSISTANT: <Retrieval>1. a red circle 2. a blue square </Retrieval>",
    "What is in the image? yes no one two three green yellow black white triangle",
    "Answer the question using a single word or phrase.",
    "one\n\ntwo\n\n\nthree\n\n\n\nfour",  # line breaks beside an image may become one token with those of the text
)

# LLaVA-1.5 as its authors trained it; the content is a text, or a list of parts.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set content = message['content'] -%}"
    "{%- if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: {% endif -%}"
    "{%- if content is string %}{{ content }}{% else -%}"
    "{%- for part in content %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif -%}"
    "{%- if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}ASSISTANT:{% endif -%}"
)


def build_lvlm(folder: Path, seed: int = 0, chat_template: str = CHAT_TEMPLATE, heads: int = 4) -> Path:
    """Write a tiny LLaVA, its processor and its tokenizer into `folder`. Images are 32x32, and take 4 tokens each."""
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        GenerationConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    from surf.demo.train import hub_names

    tokenizer = build_tokenizer()
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 32},
            crop_size={"height": 32, "width": 32},
            image_mean=[0.48145466, 0.4578275, 0.40821073],
            image_std=[0.26862954, 0.26130258, 0.27577711],
        ),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        **special,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=16
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=processor.image_token_id,
        image_seq_length=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **special,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder)
    hub_names(folder / "model.safetensors")
    processor.save_pretrained(folder)
    return folder


def build_tokenizer(bos: str | None = "<s>", eos: str = "</s>", more: dict[str, str] | None = None):
    """A byte-level BPE of 600 tokens. `more`: attribute of the tokenizer to further special token, such as `image_token`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    more = {"image_token": "<image>"} if more is None else more
    special = list(dict.fromkeys(["<unk>", bos or eos, eos, "<pad>", *more.values()]))
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token=bos,
        eos_token=eos,
        pad_token="<pad>",
        extra_special_tokens=more,
    )


def draw_images(folder: Path, names: list[str], seed: int = 0) -> Path:
    """Write one drawn image for each name: a rectangle on a plain ground, of various sizes and proportions."""
    from PIL import Image, ImageDraw

    draw = random.Random(seed)
    for name in names:
        width, height = draw.randrange(40, 90), draw.randrange(40, 90)
        image = Image.new("RGB", (width, height), tuple(draw.randrange(256) for _ in range(3)))
        box = (width // 4, height // 4, width * 3 // 4, height * 3 // 4)
        ImageDraw.Draw(image).rectangle(box, fill=tuple(draw.randrange(256) for _ in range(3)))
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder


if __name__ == "__main__":
    build_lvlm(Path(sys.argv[1]))
