"""Batches without padding: the samples of a batch stand one behind the other in one row, and none sees another.

The row is cut up again inside the attention alone, so each sample takes the fast causal kernel and no mask is built.
"""

from typing import Any

ATTENTION = "surf_packed"


def pack(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch padded on the right as one row of all its samples.

    Args:
        batch: `input_ids`, `labels` and `attention_mask` (samples, tokens) int64, and what belongs to the images.

    Returns:
        the same with `input_ids`, `labels`, `position_ids` (1, all tokens) int64, `pack_lengths` (tokens of each sample), and
        without `attention_mask`. A sample's first label is without loss, so shifting labels mixes up no samples.
    """
    import torch

    mask = batch.pop("attention_mask").bool()
    lengths = mask.sum(1).tolist()
    rows = {name: batch[name][mask][None] for name in ("input_ids", "labels")}
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {**batch, **rows, "position_ids": positions, "pack_lengths": lengths}


def enable(model: Any) -> None:
    """Let the language model's attention work on packed rows. The vision tower's stays as it is."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
    model.config.get_text_config()._attn_implementation = ATTENTION


def disable(model: Any) -> None:
    """Back to the attention that everybody knows: its name would be saved with the model."""
    model.config.get_text_config()._attn_implementation = "sdpa"


def _attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    pack_lengths: list[int] | None = None,
    **_: Any,
) -> tuple[Any, None]:
    """(1, heads, all tokens, size) each; returns (1, all tokens, heads, size)."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    lengths = pack_lengths or [query.shape[2]]
    grouped = query.shape[1] != key.shape[1]

    def attend(q: Any, k: Any, v: Any) -> Any:
        """(samples, tokens, heads, size) each."""
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        made = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=grouped)
        return made.transpose(1, 2)

    # as the projections have left them, (1, tokens, heads, size): their gradients are put together by one plain copy each
    whole = [one.transpose(1, 2) for one in (query, key, value)]
    if len(set(lengths)) == 1:  # one call, and no copy
        return attend(*(one.unflatten(1, (len(lengths), lengths[0])).squeeze(0) for one in whole)).flatten(0, 1)[None], None
    cut = [one.split(lengths, 1) for one in whole]
    return torch.cat([attend(*own) for own in zip(*cut, strict=True)], 1), None  # the flash kernel's own layout: one copy
