"""Train the LLaVA on `surf.demo.lessons`: text first, then images."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from surf.demo import together
from surf.demo.lessons import KINDS, Rows
from surf.demo.tokens import BOS, EOS, IMAGE, PAD
from surf.models import fused


def batch_loss(model: Any, batch: dict[str, Any], features: Any) -> dict[str, Any]:
    """Return the weighted cross-entropy of a batch of `collate`: "all", and of each kind of question apart.

    Answers go by the batch's own name. features: [images, patches, width] of the vision tower.
    """
    import torch
    from torch.nn import functional

    names, kinds = [batch.pop("name"), *KINDS[1:]], batch.pop("kinds")
    batch = {name: value.to(model.device, non_blocking=True) for name, value in batch.items()}
    ids, segment, weight, length = batch["ids"], batch["segment"], batch["weight"], batch["ids"].shape[1]
    embedded = model.get_input_embeddings()(ids)
    if features is not None:
        projected = model.model.multi_modal_projector(features[batch["images"]])
        embedded = embedded.masked_scatter((ids == IMAGE).unsqueeze(-1), projected.to(embedded.dtype))
    earlier = torch.ones(length, length, dtype=torch.bool, device=model.device).tril()
    same = segment.unsqueeze(2) == segment.unsqueeze(1)
    allowed = earlier & (same | (segment == 0).unsqueeze(1))
    mask = torch.zeros(allowed.shape, device=model.device).masked_fill_(~allowed, -1e9).unsqueeze(1)
    hidden = model.model.language_model(
        inputs_embeds=embedded, attention_mask=mask, position_ids=batch["position"], use_cache=False
    ).last_hidden_state
    goal = batch["goal"]
    logits = model.lm_head(hidden[:, :-1].flatten(0, 1)[goal]).float()
    losses = functional.cross_entropy(logits, ids[:, 1:].flatten()[goal], reduction="none")
    scale = weight[:, 1:].flatten()[goal]
    kind = batch["kind"][:, 1:].flatten()[goal]
    parts = {"all": scale, **{names[one]: scale * (kind == one) for one in kinds}}
    return {name: (losses * own).sum() / own.sum() for name, own in parts.items()}


def optimize(parameters: list[Any], draw: Callable[[], dict[str, Any]], steps: int, rate: float, label: str) -> None:
    """Run AdamW for `steps` losses "all" drawn by `draw`, with warm-up and cosine decay; print means by their names."""
    import torch

    cuda = parameters[0].device.type == "cuda"
    adam = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.98), fused=cuda)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=steps + 1, pct_start=0.1)
    start = time.time()
    means: dict[str, tuple[Any, int]] = {}  # on the device: to read them makes it wait
    for step in range(1, steps + 1):
        losses = draw()
        adam.zero_grad(set_to_none=True)
        losses["all"].backward()
        together.average(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        schedule.step()
        for name, loss in losses.items():
            mean, count = means.get(name, (0.0, 0))
            means[name] = mean + (loss.detach() - mean) / min(count + 1, 30), count + 1
        if together.first() and (step % 100 == 0 or step == steps):
            words = ", ".join(f"{name} {float(mean):.3f}" for name, (mean, _) in sorted(means.items()))
            print(f"{label}: step {step}/{steps}, loss: {words}; {time.time() - start:.0f} s", flush=True)


def build_model(clip: Any, vocabulary: int, recipe: Any) -> Any:
    """Return an untrained LlavaForConditionalGeneration around the vision tower of an open_clip model."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    visual, width = clip.visual, recipe.width
    blocks, inner = visual.transformer.resblocks, visual.class_embedding.shape[0]
    vision = CLIPVisionConfig(
        hidden_size=inner,
        intermediate_size=4 * inner,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        image_size=visual.image_size[0],
        patch_size=visual.patch_size[0],
        hidden_act="gelu",
        projection_dim=clip.text_projection.shape[1],
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=round(width * 8 / 3 / 16) * 16,
        num_hidden_layers=recipe.layers,
        num_attention_heads=width // recipe.head,
        max_position_embeddings=1024,
        initializer_range=width**-0.5,  # 0.02 is far too small at this width
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=recipe.patches,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    copy_vision(visual, model.model.vision_tower)
    return model


def copy_vision(visual: Any, tower: Any) -> None:
    """Copy open_clip's vision weights into transformers' CLIPVisionModel, which names them differently."""
    import torch

    source = visual.state_dict()
    width = visual.class_embedding.shape[0]
    plain = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
    }
    for side in ("weight", "bias"):
        plain |= {f"pre_layrnorm.{side}": f"ln_pre.{side}", f"post_layernorm.{side}": f"ln_post.{side}"}
        for block in range(len(visual.transformer.resblocks)):
            here, there = f"encoder.layers.{block}", f"transformer.resblocks.{block}"
            names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
            names["self_attn.out_proj"] = "attn.out_proj"
            plain |= {f"{here}.{mine}.{side}": f"{there}.{theirs}.{side}" for mine, theirs in names.items()}
    target = tower.state_dict()
    offset = "vision_model." if any(name.startswith("vision_model.") for name in target) else ""
    values = {offset + mine: source[theirs] for mine, theirs in plain.items()}
    for block in range(len(visual.transformer.resblocks)):
        for side in ("weight", "bias"):
            joint = source[f"transformer.resblocks.{block}.attn.in_proj_{side}"].split(width)
            for letter, value in zip("qkv", joint, strict=True):
                values[f"{offset}encoder.layers.{block}.self_attn.{letter}_proj.{side}"] = value
    with torch.no_grad():
        missing, unexpected = tower.load_state_dict(values, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing), (missing, unexpected)


def vision_features(model: Any, pixels: Any, batch: int = 512) -> Any:
    """Return patch features [images, patches, width], float32, of pixels uint8 [images, size, size, 3]."""
    import torch

    from surf.demo.train_clip import normalise

    layer = model.config.vision_feature_layer
    parts = []
    with torch.no_grad():
        for start in range(0, len(pixels), batch):
            states = model.model.vision_tower(normalise(pixels[start : start + batch]), output_hidden_states=True).hidden_states
            parts.append(states[layer][:, 1:].float())
    return torch.cat(parts)


def train(model: Any, bank: Any, pixels: Any, tokenizer: Any, recipe: Any) -> None:
    """Warm up on captions alone, then train on images with and without references; the vision tower stays frozen.

    bank: see `lessons.Bank`; pixels: uint8 [3 * scenes, size, size, 3].
    """
    rng = random.Random(f"lvlm:{recipe.seed}")
    decoder = model.model.language_model
    if recipe.bf16:  # a large run: most of a step is norms, activations and rotary positions, one after the other
        fused.enable(decoder, list(decoder.layers))
    # the vision tower stays frozen: tuning it along with a language model that cannot read it yet spoils both
    model.model.vision_tower.requires_grad_(False)
    features = vision_features(model, pixels)
    for blind, label in ((True, "lvlm text"), (False, "lvlm images")):
        rows = Rows(bank, tokenizer, recipe, blind)
        batches = batches_of(rows, recipe.workers) if recipe.workers else (rows.draw(rng, rng) for _ in range(len(rows)))
        trained = list(decoder.parameters()) if blind else [p for p in model.parameters() if p.requires_grad]

        def loss(seen: Any = None if blind else features, batches: Iterator[Any] = batches) -> dict[str, Any]:
            with recipe.autocast():
                return batch_loss(model, next(batches), seen)

        rate = recipe.text_rate if blind else recipe.image_rate
        optimize(trained, loss, len(rows), rate, label)
    fused.disable(decoder)


def batches_of(rows: Any, workers: int) -> Iterator[Any]:
    """The batches in order, made by `workers` processes."""
    from torch.utils.data import DataLoader

    return iter(DataLoader(rows, batch_size=None, num_workers=workers, multiprocessing_context="fork"))
