"""Train the world's models from nothing: CLIP, LLaVA on its vision tower, BERT; of the large ones a retriever as well.

    python -m surf.demo.train --out surf/demo/models                                      the embedded example's, on a CPU
    torchrun --standalone --nproc-per-node 2 -m surf.demo.train --out models --size large --device cuda --workers 15
                                                                                          those of `surf.demo.controlled`

Training scenes are drawn from their own random streams, so no image of a world is ever seen here. With --size large the
models are saved in bfloat16, and the language model learns two things apart: to answer with references that are always true,
so that it believes them, and to say whether a reference is of the scene it is asked about. What it never learns here is to
make its belief depend on that; a fine-tune can.
A model whose folder is there is not trained again. Several processes share the scenes and the batches between them.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from surf.demo import questions as q
from surf.demo import together, tokens
from surf.demo.draw import STYLES, Style, render
from surf.demo.lessons import Bank, Lesson
from surf.demo.recipes import PATCH, RECIPES, Recipe
from surf.demo.train_clip import load_clip, train_clip, train_retriever
from surf.demo.train_lvlm import build_model, optimize, train
from surf.demo.world import CLEAR_NOISE, QUERY_HIDE, QUERY_NOISE


def draw_bank(
    scenes: int, seed: int, style: Style = STYLES["small"], workers: int = 0, first: int = 0, step: int = 1
) -> tuple[Bank, Any]:
    """Return scenes with their look-alikes, and pixels uint8 [3 * scenes, size, size, 3].

    The three images of a scene are a query view of the scene, a clear re-render of it and the clear look-alike. Of a larger
    style the scenes are numbers first, first + step, …: as many for each of `step` processes.
    """
    import numpy as np

    bank, images = [], np.empty((3 * scenes, style.size, style.size, 3), dtype=np.uint8)
    numbers = range(first, first + scenes * step, step)
    for number, (lesson, views) in enumerate(_draw_scenes(numbers, seed, style, workers)):
        bank.append(lesson)
        for offset, view in enumerate(views):
            images[3 * number + offset] = view
    return bank, images


def _draw_scenes(numbers: range, seed: int, style: Style, workers: int) -> Iterator[tuple[Lesson, list[Any]]]:
    """Yield every scene and its three images: from one random stream, or for a larger style from one for each scene."""
    from multiprocessing import get_context

    if style == STYLES["small"]:
        rng = random.Random(f"train:{seed}")
        yield from (_draw_scene(rng, style) for _ in numbers)
    elif not workers:
        yield from (_draw_own(seed, style, number) for number in numbers)
    else:
        with get_context("spawn").Pool(workers) as pool:
            yield from pool.imap(partial(_draw_own, seed, style), numbers, chunksize=100)


def _draw_own(seed: int, style: Style, number: int) -> tuple[Lesson, list[Any]]:
    return _draw_scene(random.Random(f"train:{seed}:{number}"), style)


def _draw_scene(rng: random.Random, style: Style) -> tuple[Lesson, list[Any]]:
    import numpy as np

    scene = q.sample_scene(rng, style=style)
    if style == STYLES["small"]:
        hidden = q.pick_hidden(scene, rng, QUERY_HIDE)
        other = q.look_alike(scene, rng, hidden)
    else:
        hidden = q.hide_some(scene, rng, style)
        tells = rng.choice((1, 1, 2, 3))  # the easy ones are learned first, and the way to the hard ones
        other = q.mislead(scene, rng, hidden, tells, style)
    views = (
        render(scene, rng, QUERY_NOISE, hidden, style),
        render(scene, rng, CLEAR_NOISE, style=style),
        render(other, rng, CLEAR_NOISE, style=style),
    )
    return Lesson(scene, other, tuple(hidden)), [np.asarray(view) for view in views]


def train_lvlm(recipe: Recipe, bank: Bank, pixels: Any, clip: Any, bpe: Any, out: Path) -> None:
    """Train and save the LLaVA with its processor and greedy generation settings."""
    import torch
    from transformers import GenerationConfig

    torch.manual_seed(recipe.seed)
    tokenizer = tokens.wrap(bpe, "lvlm")
    model = build_model(clip, len(tokenizer), recipe).to(recipe.device)
    train(model, bank, pixels, tokenizer, recipe)
    if not together.first():
        return
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=32, bos_token_id=tokens.BOS, eos_token_id=tokens.EOS, pad_token_id=tokens.PAD
    )
    model = model.to(torch.bfloat16) if recipe.bf16 else model
    tokens.save_processor(tokenizer, out, recipe.style.size, PATCH)
    model.eval().save_pretrained(out)
    hub_names(out / "model.safetensors")


def hub_names(path: Path) -> None:
    """Name the vision tower's weights as LLaVA's published checkpoints do.

    transformers leaves out a level of a tower that it built itself, and keeps it in one that it loaded. It reads both ways;
    vLLM 0.26 reads the published one.
    """
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    inner = "vision_tower.vision_model."
    named = {key if key.startswith(inner) else key.replace("vision_tower.", inner, 1): own for key, own in weights.items()}
    save_file(named, path, {"format": "pt"})


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
    model: Any = BertForMaskedLM(config).to(recipe.device)  # type: ignore[arg-type]
    rng = random.Random(f"bert:{recipe.seed}:{recipe.rank}" if recipe.rank else f"bert:{recipe.seed}")

    def text() -> str:
        scene = q.sample_scene(rng, style=recipe.style)
        return q.caption(scene, rng) if rng.random() < 0.8 else q.other_round(scene, rng).answer

    def draw() -> dict[str, Any]:
        batch = tokenizer([text() for _ in range(64)], padding=True, return_tensors="pt").to(recipe.device)
        noise = torch.rand(batch.input_ids.shape).to(recipe.device)
        masked = (noise < 0.2) & (batch.input_ids > tokens.MASK)
        masked[0, 1] = True  # never an empty loss
        labels = batch.input_ids.masked_fill(~masked, -100)
        ids = batch.input_ids.masked_fill(masked & (noise < 0.17), tokens.MASK)
        return {"all": model(input_ids=ids, attention_mask=batch.attention_mask, labels=labels).loss}

    optimize(list(model.parameters()), draw, recipe.bert_steps, 2e-3, "bert")
    if not together.first():
        return
    model.eval().bert.save_pretrained(out)
    tokenizer.save_pretrained(out)


def run(recipe: Recipe, out: Path) -> None:
    """Train all models in turn and write them below `out`."""
    import torch

    torch.set_num_threads(recipe.threads)
    start = time.time()

    def note(text: str) -> None:
        if together.first():
            print(f"{text}, {time.time() - start:.0f} s", flush=True)

    rank, world, device = together.join(recipe.device)
    share = {name: getattr(recipe, name) // world for name in ("scenes", "clip_batch", "retriever_batch", "lvlm_batch")}
    recipe = replace(recipe, rank=rank, world=world, device=device, **share)
    bank, images = draw_bank(recipe.scenes, recipe.seed, recipe.style, recipe.workers, rank, world)
    note(f"drew {world} x {len(images)} images")
    pixels = torch.from_numpy(images).to(recipe.device)
    bpe = tokens.train_bpe(recipe.seed, style=recipe.style)
    note(f"{bpe.get_vocab_size()} tokens")
    if (out / "clip" / "open_clip_model.safetensors").exists():
        clip = load_clip(out / "clip").to(recipe.device)
    else:
        clip = train_clip(recipe, bank, pixels, tokens.wrap(bpe, "clip"), out / "clip")
    note("CLIP")
    if not (out / "lvlm" / "model.safetensors").exists():
        train_lvlm(recipe, bank, pixels, clip, bpe, out / "lvlm")
    note("LLaVA")
    if recipe.retriever_steps and not (out / "retriever" / "open_clip_model.safetensors").exists():
        train_retriever(recipe, bank, pixels, clip, tokens.wrap(bpe, "clip"), out / "retriever")
    note("retriever")
    if not (out / "bert" / "model.safetensors").exists():
        train_bert(recipe, bpe, out / "bert")
    note("BERT")
    together.leave()


def main() -> None:
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--size", choices=list(RECIPES), default="small", help="whose recipe the defaults are")
    recipe = RECIPES[first.parse_known_args()[0].size]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[first])
    parser.add_argument("--out", type=Path, required=True)
    for field in fields(Recipe):
        if field.name not in ("size", "rank", "world"):
            default = getattr(recipe, field.name)
            kind = {"type": type(default)} if field.name != "bf16" else {"action": argparse.BooleanOptionalAction}
            parser.add_argument(f"--{field.name.replace('_', '-')}", default=default, **kind)
    args = vars(parser.parse_args())
    out = args.pop("out")
    run(replace(recipe, **args), out)


if __name__ == "__main__":
    main()
