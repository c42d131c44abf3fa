"""Train the embedded world's three tiny models from nothing: CLIP, LLaVA on its vision tower, and BERT.

    python -m surf.demo.train --out surf/demo/models

Training scenes are drawn from their own random streams, so no image of `surf.demo.world` is ever seen here.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from surf.demo import questions as q
from surf.demo import tokens
from surf.demo.draw import COLORS, KINDS, SIZE, Scene, render
from surf.demo.train_lvlm import build_model, optimize, train
from surf.demo.world import CLEAR_NOISE, QUERY_HIDE, QUERY_NOISE

PATCH = 16  # pixels; 4 x 4 patches per image
CONTEXT = 48  # CLIP text tokens
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own pixel statistics, as both preprocessors use them
STD = (0.26862954, 0.26130258, 0.27577711)


PAIRS = [(kind, color) for kind in KINDS for color in COLORS]


@dataclass
class Recipe:
    """Sizes and lengths of the training run; every field is a flag."""

    seed: int = 0
    scenes: int = 5000  # training scenes, three images each
    vision_width: int = 96
    vision_layers: int = 4
    clip_steps: int = 1200
    clip_batch: int = 128
    clip_rate: float = 2e-3
    width: int = 96
    layers: int = 3
    lvlm_batch: int = 12
    text_steps: int = 300
    text_rate: float = 2e-3
    image_steps: int = 1000
    image_rate: float = 1.5e-3
    reference_share: float = 0.5  # of the training prompts, with one to three references
    trust: float = 0.93  # of those references, clear re-renders of the query scene: the model learns to believe them
    stray: float = 0.0  # of those references, unrelated scenes; the rest are look-alikes
    bert_steps: int = 400
    threads: int = 2
    device: str = "cpu"


def draw_bank(scenes: int, seed: int) -> tuple[list[tuple[Scene, Scene]], Any]:
    """Return (scene, look-alike) pairs and pixels uint8 [3 * scenes, SIZE, SIZE, 3].

    The three images of a pair are a query view of the scene, a clear re-render of it and the clear look-alike.
    """
    import numpy as np

    rng = random.Random(f"train:{seed}")
    bank, images = [], np.empty((3 * scenes, SIZE, SIZE, 3), dtype=np.uint8)
    for number in range(scenes):
        scene = q.sample_scene(rng)
        hidden = q.pick_hidden(scene, rng, QUERY_HIDE)
        other = q.look_alike(scene, rng, hidden)
        bank.append((scene, other))
        views = (
            render(scene, rng, QUERY_NOISE, hidden),
            render(scene, rng, CLEAR_NOISE),
            render(other, rng, CLEAR_NOISE),
        )
        for offset, view in enumerate(views):
            images[3 * number + offset] = np.asarray(view)
    return bank, images


def normalise(images: Any) -> Any:
    """Return float32 [n, 3, SIZE, SIZE] for the vision towers from uint8 [n, SIZE, SIZE, 3]."""
    import torch

    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def pair_labels(bank: list[tuple[Scene, Scene]]) -> Any:
    """Return float32 [3 * scenes, kinds * colours]: 1 where an image shows that kind in that colour."""
    import torch

    labels = torch.zeros(3 * len(bank), len(PAIRS))
    for number, (scene, other) in enumerate(bank):
        for offset, shown in enumerate((scene, scene, other)):
            for item in shown.items:
                labels[3 * number + offset, PAIRS.index((item.kind, item.color))] = 1
    return labels


def clip_config(recipe: Recipe, vocabulary: int) -> dict[str, Any]:
    vision = {
        "image_size": SIZE,
        "patch_size": PATCH,
        "layers": recipe.vision_layers,
        "width": recipe.vision_width,
        "head_width": 16,
    }
    text = {
        "context_length": CONTEXT,
        "vocab_size": vocabulary,
        "hf_tokenizer_name": ".",  # open_clip then reads the tokenizer from its own local folder
        "width": 64,
        "heads": 4,
        "layers": 2,
        "pool_type": "eos",
        "eos_id": tokens.EOS,
        "pad_id": tokens.PAD,
    }
    return {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}


def train_clip(recipe: Recipe, bank: list[tuple[Scene, Scene]], pixels: Any, tokenizer: Any, out: Path) -> Any:
    """Train and save an open_clip model by contrast between images and captions; return it in eval mode."""
    import torch
    from open_clip.model import CLIP
    from safetensors.torch import save_file
    from torch.nn import functional

    torch.manual_seed(recipe.seed)
    config = clip_config(recipe, len(tokenizer))
    model = CLIP(**config).to(recipe.device)
    model.logit_scale.data.fill_(2.0)  # a soft start: exp(2) = 7.4
    rng = random.Random(f"clip:{recipe.seed}")

    # an auxiliary head finds (kind, colour) in the patch tokens that the LLaVA will read; contrast alone trains them
    # far too slowly at this size. It is thrown away afterwards
    head = torch.nn.Sequential(torch.nn.LayerNorm(recipe.vision_width), torch.nn.Linear(recipe.vision_width, len(PAIRS)))
    head.to(recipe.device)
    patches: list[Any] = []
    model.visual.transformer.resblocks[-2].register_forward_hook(lambda _m, _i, output: patches.append(output[:, 1:]))

    def draw() -> Any:
        # query views, re-renders and look-alikes share the batch, so near misses are told apart too
        chosen = rng.sample(range(len(bank)), recipe.clip_batch * 3 // 4)
        picked = [3 * number + rng.randrange(2) for number in chosen]
        picked += [3 * number + 2 for number in chosen[: recipe.clip_batch // 4]]
        captions = [q.caption(bank[index // 3][1 if index % 3 == 2 else 0], rng) for index in picked]
        ids = tokenizer(captions, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt").input_ids
        ids = ids[:, : int((ids != tokens.PAD).sum(1).max())].to(recipe.device)
        image, text = model.encode_image(pixels[picked], normalize=True), _encode_text(model, ids)
        logits = model.logit_scale.exp().clamp(max=50) * image @ text.T
        goal = torch.arange(len(picked), device=logits.device)
        contrast = (functional.cross_entropy(logits, goal) + functional.cross_entropy(logits.T, goal)) / 2
        seen = head(patches.pop()).logsumexp(dim=1) - 6
        shown = labels[picked]
        return contrast + 10 * functional.binary_cross_entropy_with_logits(seen, shown)

    labels = pair_labels(bank).to(recipe.device)
    optimize([*model.parameters(), *head.parameters()], draw, recipe.clip_steps, recipe.clip_rate, "clip")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    preprocess = {"size": SIZE, "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (out / "open_clip_config.json").write_text(text + "\n")
    save_file(
        {name: value.contiguous().cpu() for name, value in model.state_dict().items()}, out / "open_clip_model.safetensors"
    )
    return model.eval()


def _encode_text(model: Any, ids: Any) -> Any:
    """Return unit text embeddings of ids [batch, length <= CONTEXT]; open_clip's own method wants full length."""
    from torch.nn import functional

    hidden = model.token_embedding(ids) + model.positional_embedding[: ids.shape[1]]
    hidden = model.transformer(hidden, attn_mask=model.attn_mask[: ids.shape[1], : ids.shape[1]])
    last = (ids == tokens.EOS).int().argmax(dim=1)
    pooled = model.ln_final(hidden)[list(range(len(ids))), last]
    return functional.normalize(pooled @ model.text_projection, dim=-1)


def train_lvlm(recipe: Recipe, bank: list[tuple[Scene, Scene]], pixels: Any, clip: Any, bpe: Any, out: Path) -> Any:
    """Train and save the LLaVA with its processor and greedy generation settings."""
    import torch
    from transformers import GenerationConfig

    torch.manual_seed(recipe.seed)
    tokenizer = tokens.wrap(bpe, "lvlm")
    model = build_model(clip, len(tokenizer), recipe.width, recipe.layers).to(recipe.device)
    train(model, bank, pixels, tokenizer, recipe)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=32, bos_token_id=tokens.BOS, eos_token_id=tokens.EOS, pad_token_id=tokens.PAD
    )
    model.eval().save_pretrained(out)
    tokens.save_processor(tokenizer, out, SIZE, PATCH)
    return model


def train_bert(recipe: Recipe, bpe: Any, out: Path) -> None:
    """Train and save a two-layer BERT by masking tokens of captions and answers; BERTScore compares texts with it."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(recipe.seed)
    tokenizer = tokens.wrap(bpe, "bert")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=128,
        type_vocab_size=1,
        pad_token_id=tokens.PAD,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: Any = BertForMaskedLM(config)
    model.to(recipe.device)
    rng = random.Random(f"bert:{recipe.seed}")

    def text() -> str:
        scene = q.sample_scene(rng)
        return q.caption(scene, rng) if rng.random() < 0.8 else q.other_round(scene, rng).answer

    def draw() -> Any:
        batch = tokenizer([text() for _ in range(64)], padding=True, return_tensors="pt").to(recipe.device)
        noise = torch.rand(batch.input_ids.shape).to(recipe.device)
        masked = (noise < 0.2) & (batch.input_ids > tokens.MASK)
        masked[0, 1] = True  # never an empty loss
        labels = batch.input_ids.masked_fill(~masked, -100)
        ids = batch.input_ids.masked_fill(masked & (noise < 0.17), tokens.MASK)
        return model(input_ids=ids, attention_mask=batch.attention_mask, labels=labels).loss

    optimize(list(model.parameters()), draw, recipe.bert_steps, 2e-3, "bert")
    model.eval().bert.save_pretrained(out)
    tokenizer.save_pretrained(out)


def run(recipe: Recipe, out: Path) -> None:
    """Train all three models in turn and write them below `out`."""
    import torch

    torch.set_num_threads(recipe.threads)
    start = time.time()
    bank, images = draw_bank(recipe.scenes, recipe.seed)
    print(f"drew {len(images)} images, {time.time() - start:.0f} s", flush=True)
    pixels = normalise(images).to(recipe.device)
    bpe = tokens.train_bpe(recipe.seed)
    print(f"{bpe.get_vocab_size()} tokens, {time.time() - start:.0f} s", flush=True)
    clip = train_clip(recipe, bank, pixels, tokens.wrap(bpe, "clip"), out / "clip")
    train_lvlm(recipe, bank, pixels, clip, bpe, out / "lvlm")
    train_bert(recipe, bpe, out / "bert")
    print(f"done, {time.time() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for field in fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    args = vars(parser.parse_args())
    out = args.pop("out")
    run(Recipe(**args), out)


if __name__ == "__main__":
    main()
