"""The world's CLIPs, trained from nothing: one that learns from captions, and a retriever that finds views of one place."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surf.demo import questions as q
from surf.demo import together, tokens
from surf.demo.draw import KINDS, Style
from surf.demo.lessons import Bank
from surf.demo.recipes import PATCH, Recipe
from surf.demo.train_lvlm import batches_of, optimize

CONTEXT = 48  # CLIP text tokens
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own pixel statistics, as both preprocessors use them
STD = (0.26862954, 0.26130258, 0.27577711)


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
    batches = _batches(Captions(bank, tokenizer, recipe), "clip")

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
        contrast = _contrast(model.logit_scale.exp().clamp(max=50) * image.float() @ text.float().T)
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
    batches = _batches(Views(bank, tokenizer, recipe), "retriever")
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
        contrast = _contrast(scale * clear @ text.T)
        return {"all": sum(found) + contrast, "re-render": found[0], "look-alike": found[1], "contrast": contrast}

    optimize(list(model.parameters()), loss, recipe.retriever_steps, recipe.retriever_rate, "retriever")
    if together.first():
        _save_clip(model, clip_config(recipe, len(tokenizer)), tokenizer, recipe, out)


def _contrast(logits: Any) -> Any:
    """CLIP's loss of similarities [n, n]: each image finds its own text, and each text its own image."""
    import torch
    from torch.nn import functional

    goal = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, goal) + functional.cross_entropy(logits.T, goal)) / 2


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


def _batches(rows: Captions, label: str) -> Iterator[tuple[Any, Any]]:
    recipe = rows.recipe
    rng = random.Random(f"{label}:{recipe.seed}")
    return batches_of(rows, recipe.workers) if recipe.workers else (rows.draw(rng) for _ in range(len(rows)))


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


def load_clip(folder: Path) -> Any:
    """Return the trained open_clip model in float32 and eval mode."""
    import open_clip

    return open_clip.create_model(f"local-dir:{folder}").eval()
