"""Train the world's tokenizer and save it the way open_clip, LLaVA and BERT each expect it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from surf.demo import questions as q
from surf.demo.draw import SMALL, Style

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<mask>")  # ids 0..5, the same in the three tokenizers
PAD, BOS, EOS, IMAGE, MASK = 0, 1, 2, 4, 5
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set turn = namespace(text='') -%}
{%- if message['content'] is string -%}
{%- set turn.text = message['content'] -%}
{%- else -%}
{%- for item in message['content'] -%}
{%- set turn.text = turn.text + ('<image>' if item['type'] == 'image' else item['text']) -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'system' -%}
{{ turn.text + ' ' }}
{%- elif message['role'] == 'user' -%}
{{ 'USER: ' + turn.text + ' ' }}
{%- else -%}
{{ 'ASSISTANT: ' + turn.text + '</s>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'ASSISTANT:' }}
{%- endif -%}
"""


def layout(question: str, captions: list[str]) -> str:
    """Return the text of one user turn: references first, one `<image>` tag per image, the query image last."""
    if not captions:
        return f"<image>\n{question}"
    lines = "".join(f"{number}. <image> {caption} \n" for number, caption in enumerate(captions, start=1))
    return f"<Retrieval>{lines}</Retrieval> <image>\n{question}"


def train_bpe(seed: int = 0, vocabulary: int = 900, style: Style = SMALL) -> Any:
    """Return a byte-level BPE `tokenizers.Tokenizer` of at most `vocabulary` entries, trained on the world's text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=8,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, style), trainer)
    return tokenizer


def _texts(seed: int, style: Style, scenes: int = 800) -> list[str]:
    """Return prompts with answers, so that every word of the world becomes one token."""
    rng = random.Random(f"text:{seed}")
    texts = []
    for _ in range(scenes):
        scene = q.sample_scene(rng, style=style)
        rounds = [*q.yes_no_rounds(scene, rng, 4), q.ask_color(scene, rng), q.ask_place(scene)]
        rounds += [q.ask_choice(scene, rng), q.ask_caption(scene, rng)]
        captions = [q.caption(scene, rng) for _ in range(rng.randint(1, 3))]
        for one in rounds:
            system, shown = (q.SYSTEM_REFERENCES, captions) if rng.random() < 0.5 else (q.SYSTEM, [])
            texts.append(f"{system} USER: {layout(one.text, shown)} ASSISTANT: {one.answer}")
        if style != SMALL:
            texts += [q.ask_relevance(rounds[0], helps=True).text, q.ask_same(rng.randint(1, 3), same=True).text]
            texts += [
                q.ask_agree(rng.randint(1, 3), rng.choice(scene.kinds), same=True).text,
                q.told_to_leave_out(rounds[0]).text,
            ]
    return texts


def wrap(bpe: Any, role: str) -> Any:
    """Return a transformers tokenizer. role: clip (<s> text </s>), bert (the same, with mask) or lvlm (<s> text)."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_str(bpe.to_str())
    single = "<s> $A" if role == "lvlm" else "<s> $A </s>"
    inner.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B:1", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    if role == "bert":
        names |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    if role == "lvlm":
        names |= {"extra_special_tokens": {"image_token": "<image>"}}
    length = {"lvlm": 1024, "bert": 128, "clip": 48}[role]
    side = "left" if role == "lvlm" else "right"  # generation pads on the left
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=length, padding_side=side, clean_up_tokenization_spaces=False, **names
    )
    if role == "lvlm":
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_processor(tokenizer: Any, out: Path, size: int, patch: int) -> None:
    """Write LlavaProcessor files: tokenizer, image processor (size x size pixels) and chat template."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(out)
