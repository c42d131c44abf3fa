"""A LLaVA-1.5 at real size with random weights, photographs that nobody took, and training pairs of them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from surf import config, samples, store
from surf.shards import stable_hash

WORDS = 31_000  # w0, w1, …: one token each
TEXT_TOKENS = 300
NAMES = 64  # different photographs


def processor_and_config(tiny: bool, layers: int | None = None) -> tuple[Any, Any]:
    """The processor and the config of LLaVA-1.5-7B, with fewer `layers` if given, or of a tiny one; no weights."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

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
            "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
        ),
    )
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # two heads: vLLM's CPU build knows none of fewer than 32 numbers
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2} if tiny else {}
    text |= {"num_hidden_layers": layers} if layers else {}
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
    return processor, whole


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


def model(whole: Any, dtype: Any, device: str | None = None) -> Any:
    """Random weights of the config `whole`; under ZeRO-3 each process makes its share."""
    import torch
    from transformers import AutoModelForImageTextToText, set_seed

    set_seed(0)
    with torch.device(device or "cpu"):
        made = AutoModelForImageTextToText.from_config(whole, dtype=dtype, attn_implementation="sdpa")
    for name, weight in made.named_parameters():
        if hasattr(weight, "ds_tensor"):  # spread over processes; versions of the library differ in what they fill it with
            matrix, norm = len(weight.ds_shape) > 1, "norm" in name and name.endswith("weight")
            weight.ds_tensor.data.normal_(0, 0.02) if matrix else weight.ds_tensor.data.fill_(float(norm))
    return made


def responder(tiny: bool) -> tuple[Any, Any]:
    """(model, processor), ready to answer."""
    import torch
    from transformers import GenerationConfig

    processor, whole = processor_and_config(tiny)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = model(whole, torch.float32 if tiny else torch.bfloat16, device)
    made.generation_config = GenerationConfig(
        **{name: getattr(whole, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    )
    return made.eval(), processor


def write_card(folder: Path, tiny: bool) -> Path:
    """A model folder without weights: config, processor, tokenizer."""
    processor, whole = processor_and_config(tiny)
    whole.architectures = ["LlavaForConditionalGeneration"]
    whole.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


class Pictures:
    """`Images` for any names; JPEG files in memory, few different ones."""

    def __init__(self) -> None:
        self.files = _jpegs()

    def open(self, name: str) -> Image.Image:
        """The decoded image."""
        return Image.open(io.BytesIO(self.files[stable_hash(name) % len(self.files)])).convert("RGB")


def photographs(folder: Path) -> config.Images:
    """The same as files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(_jpegs()):
        (folder / f"{number}.jpg").write_bytes(data)
    return config.Images(roots=[str(folder)])


def _jpegs() -> list[bytes]:
    """`NAMES` JPEG files of 640x480 pixels: smooth noise."""
    draw = np.random.default_rng(0)
    files = []
    for _ in range(NAMES):
        small = Image.fromarray(draw.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def rows(count: int, processor: Any, lvlm: config.Lvlm, images: config.Images) -> list[dict[str, Any]]:
    """Rows of `pairs` with a positive and a negative reference, each of `TEXT_TOKENS` tokens beside its three images."""
    words = 50
    draw = np.random.default_rng(0)
    for _ in range(2):  # the first one shows how many words are missing
        made = [_row(number, words, draw) for number in range(count)]
        sample = samples.make_sample(made[0], processor, lvlm, images)
        words += TEXT_TOKENS - (sample.length - sample.image_tokens)
    return made


def _row(number: int, words: int, draw: Any) -> dict[str, Any]:
    def text(count: int) -> str:
        return " ".join(f"w{word}" for word in draw.integers(0, WORDS, count))

    shared = {"image_id": number, "similarity": 0.5, "gain": 0.5}
    return {
        "round_id": f"b{number}#0",
        "image": f"{3 * number % NAMES}.jpg",
        "question": text(20),
        "answer": text(20),
        "task": "open",
        "kind": "pair",
        "positive_first": number % 2 == 0,
        "positive": {**shared, "image": f"{(3 * number + 1) % NAMES}.jpg", "caption": text(words)},
        "negative": {**shared, "image": f"{(3 * number + 2) % NAMES}.jpg", "caption": text(20)},
    }


def write(folder: Path, tiny: bool, count: int, layers: int | None = None) -> tuple[Path, Path, config.Images]:
    """A model folder, a file of `count` pairs, and their images, for a run of the command line."""
    import torch

    processor, whole = processor_and_config(tiny, layers)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model(whole, torch.float32 if tiny else torch.bfloat16, device).save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    images = photographs(folder / "images")
    lvlm = config.Lvlm(model=str(folder / "base"))
    pairs = folder / "pairs.parquet"
    store.write_table(pairs, store.table_of(rows(count, processor, lvlm, images), "pairs"), "pairs")
    return folder / "base", pairs, images


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())
