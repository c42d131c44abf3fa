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
import json
import random
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from surf.demo import questions as q
from surf.demo import together, tokens
from surf.demo.draw import KINDS, STYLES, Style, render
from surf.demo.lessons import Bank, Lesson
from surf.demo.recipes import PATCH, RECIPES, Recipe
from surf.demo.train_lvlm import batches_of, build_model, optimize, train
from surf.demo.world import CLEAR_NOISE, QUERY_HIDE, QUERY_NOISE

CONTEXT = 48  # CLIP text tokens
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own pixel statistics, as both preprocessors use them
STD = (0.26862954, 0.26130258, 0.27577711)


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


def normalise(images: Any) -> Any:
    """Return float32 [n, 3, size, size] for the vision towers from a tensor, uint8 [n, size, size, 3]."""
    import torch

    pixels = images.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def pair_labels(bank: Bank, style: Style) -> Any:
    """Return float32 [3 * scenes, kinds * colours]: 1 where an image shows that kind in that colour."""
    import torch

    place = {pair: n for n, pair in enumerate((kind, color) for kind in KINDS for color in style.colors)}
    labels = torch.zeros(3 * len(bank), len(place))
    for number, (scene, other, _) in enumerate(bank):
        for offset, shown in enumerate((scene, scene, other)):
            labels[3 * number + offset, [place[item.kind, item.color] for item in shown.items]] = 1
    return labels


def clip_config(recipe: Recipe, vocabulary: int) -> dict[str, Any]:
    vision = {
        "image_size": recipe.style.size,
        "patch_size": PATCH,
        "layers": recipe.vision_layers,
        "width": recipe.vision_width,
        "head_width": recipe.vision_head,
    }
    text = {
        "context_length": CONTEXT,
        "vocab_size": vocabulary,
        "hf_tokenizer_name": ".",  # open_clip then reads the tokenizer from its own local folder
        "width": recipe.text_width,
        "heads": recipe.text_width // 16,
        "layers": 2,
        "pool_type": "eos",
        "eos_id": tokens.EOS,
        "pad_id": tokens.PAD,
    }
    return {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}


def train_clip(recipe: Recipe, bank: Bank, pixels: Any, tokenizer: Any, out: Path) -> Any:
    """Train and save an open_clip model by contrast between images and captions; return it in eval mode.

    pixels: uint8 [3 * scenes, size, size, 3].
    """
    import torch
    from open_clip.model import CLIP
    from torch.nn import functional

    torch.manual_seed(recipe.seed)
    config = clip_config(recipe, len(tokenizer))
    model = CLIP(**config).to(recipe.device)
    model.logit_scale.data.fill_(2.0)  # a soft start: exp(2) = 7.4
    rows = Captions(bank, tokenizer, recipe)
    rng = random.Random(f"clip:{recipe.seed}")
    batches = batches_of(rows, recipe.workers) if recipe.workers else (rows.draw(rng) for _ in range(len(rows)))

    # an auxiliary head finds (kind, colour) in the patch tokens that the LLaVA will read; contrast alone trains them
    # far too slowly at this size. It is thrown away afterwards
    labels = pair_labels(bank, recipe.style).to(recipe.device)
    wide = recipe.vision_width
    head = torch.nn.Sequential(torch.nn.LayerNorm(wide), torch.nn.Linear(wide, labels.shape[1]))
    head.to(recipe.device)
    patches: list[Any] = []
    model.visual.transformer.resblocks[-2].register_forward_hook(lambda _m, _i, output: patches.append(output[:, 1:]))

    def loss() -> dict[str, Any]:
        picked, ids = (part.to(recipe.device) for part in next(batches))
        with recipe.autocast():
            image, text = model.encode_image(normalise(pixels[picked]), normalize=True), _encode_text(model, ids)
            seen = head(patches.pop()).logsumexp(dim=1) - 6
        # in full precision: near misses differ by less than bfloat16 can tell
        logits = model.logit_scale.exp().clamp(max=50) * image.float() @ text.float().T
        goal = torch.arange(len(picked), device=logits.device)
        contrast = (functional.cross_entropy(logits, goal) + functional.cross_entropy(logits.T, goal)) / 2
        objects = functional.binary_cross_entropy_with_logits(seen.float(), labels[picked])
        return {"all": contrast + 10 * objects, "contrast": contrast, "objects": objects}

    optimize([*model.parameters(), *head.parameters()], loss, recipe.clip_steps, recipe.clip_rate, "clip")
    if together.first():
        _save_clip(model, config, tokenizer, recipe, out)
    return model.eval()


def train_retriever(recipe: Recipe, bank: Bank, pixels: Any, clip: Any, tokenizer: Any, out: Path) -> None:
    """Train the CLIP on to find views of one place, and save it.

    Half of a query view is hidden, and captions alone teach to tell such a view from a clear one. Here each query view has to
    find the re-render of its scene and its look-alike among those of all others. Captions are learned on beside it.

    clip: the trained open_clip model; it is changed.
    """
    import torch
    from torch.nn import functional

    torch.manual_seed(recipe.seed)
    rows = Views(bank, tokenizer, recipe)
    rng = random.Random(f"retriever:{recipe.seed}")
    batches = batches_of(rows, recipe.workers) if recipe.workers else (rows.draw(rng) for _ in range(len(rows)))
    model = clip.train()

    def loss() -> dict[str, Any]:
        scenes, ids = (part.to(recipe.device) for part in next(batches))
        with recipe.autocast():
            views = torch.cat([3 * scenes, 3 * scenes + 1, 3 * scenes + 2])
            image, text = model.encode_image(normalise(pixels[views]), normalize=True).float(), _encode_text(model, ids).float()
        query, clear = image.tensor_split([len(scenes)])
        scale = model.logit_scale.exp().clamp(max=50)
        own = torch.arange(len(scenes), device=query.device)
        found = []
        for right, other in ((own, own + len(scenes)), (own + len(scenes), own)):  # either one, were the other not there
            logits = (scale * query @ clear.T).scatter(1, other[:, None], -torch.inf)
            found.append(functional.cross_entropy(logits, right))
        logits, goal = scale * clear @ text.T, torch.arange(len(clear), device=clear.device)
        contrast = (functional.cross_entropy(logits, goal) + functional.cross_entropy(logits.T, goal)) / 2
        return {"all": sum(found) + contrast, "re-render": found[0], "look-alike": found[1], "contrast": contrast}

    optimize(list(model.parameters()), loss, recipe.retriever_steps, recipe.retriever_rate, "retriever")
    if together.first():
        _save_clip(model, clip_config(recipe, len(tokenizer)), tokenizer, recipe, out)


def _save_clip(model: Any, config: dict[str, Any], tokenizer: Any, recipe: Recipe, out: Path) -> None:
    import torch
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    preprocess = {"size": recipe.style.size, "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (out / "open_clip_config.json").write_text(text + "\n")
    dtype = torch.bfloat16 if recipe.bf16 else torch.float32
    weights = {name: value.contiguous().cpu().to(dtype) for name, value in model.state_dict().items()}
    save_file(weights, out / "open_clip_model.safetensors")


class Captions:
    """Batches for CLIP: numbers of images, int64 [batch], and the tokens of their captions, int64 [batch, length]."""

    def __init__(self, bank: Bank, tokenizer: Any, recipe: Recipe) -> None:
        self.bank, self.tokenizer, self.recipe = bank, tokenizer, recipe

    def __len__(self) -> int:
        return self.recipe.clip_steps

    def __getitem__(self, step: int) -> tuple[Any, Any]:
        """Batch number `step`, from a random stream of its own: any number of processes may make batches."""
        return self.draw(random.Random(f"clip:{self.recipe.seed}:{step}:{self.recipe.rank}"))

    def draw(self, rng: random.Random) -> tuple[Any, Any]:
        """Query views, re-renders and look-alikes share the batch, so near misses are told apart too."""
        import torch

        size = self.recipe.clip_batch
        chosen = rng.sample(range(len(self.bank)), size * 3 // 4)
        picked = [3 * number + rng.randrange(2) for number in chosen]
        picked += [3 * number + 2 for number in chosen[: size // 4]]
        shown = (self.bank[i // 3].other if i % 3 == 2 else self.bank[i // 3].scene for i in picked)
        return torch.tensor(picked), self.tokens([q.caption(scene, rng) for scene in shown])

    def tokens(self, captions: list[str]) -> Any:
        """int64 [captions, length]."""
        ids = self.tokenizer(captions, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt").input_ids
        return ids[:, : int((ids != tokens.PAD).sum(1).max())]


class Views(Captions):
    """Batches for the retriever: numbers of scenes, int64 [batch], and captions of their re-renders and look-alikes in turn."""

    def __len__(self) -> int:
        return self.recipe.retriever_steps

    def draw(self, rng: random.Random) -> tuple[Any, Any]:
        """Scenes with all three images."""
        import torch

        chosen = rng.sample(range(len(self.bank)), self.recipe.retriever_batch)
        lessons = [self.bank[number] for number in chosen]
        shown = [lesson.scene for lesson in lessons] + [lesson.other for lesson in lessons]
        return torch.tensor(chosen), self.tokens([q.caption(scene, rng) for scene in shown])


def _encode_text(model: Any, ids: Any) -> Any:
    """Return unit text embeddings of ids [batch, length <= CONTEXT]; open_clip's own method wants full length."""
    from torch.nn import functional

    hidden = model.token_embedding(ids) + model.positional_embedding[: ids.shape[1]]
    hidden = model.transformer(hidden, attn_mask=model.attn_mask[: ids.shape[1], : ids.shape[1]])
    last = (ids == tokens.EOS).int().argmax(dim=1)
    pooled = model.ln_final(hidden)[list(range(len(ids))), last]
    return functional.normalize(pooled @ model.text_projection, dim=-1)


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


def load_clip(folder: Path) -> Any:
    """Return the trained open_clip model in float32 and eval mode."""
    import open_clip

    return open_clip.create_model(f"local-dir:{folder}").eval()


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
