"""The blocks of open_clip's vision transformer, with the same weights and fewer steps: attention without copies, and products
of 8-bit numbers for `embed.precision: fp8`.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from surf.errors import SurfError

LARGEST = 448.0  # of torch.float8_e4m3fn


def rebuild(visual: Any, precision: str) -> None:
    """Replace the attention, and for fp8 all matrix products, in the blocks of an open_clip image tower.

    Towers of another kind are left as they are.

    Raises:
        SurfError: precision is fp8, and the tower is of another kind or the GPU has no 8-bit products.
    """
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", [])
    plain = [one for one in blocks if isinstance(getattr(one, "attn", None), nn.MultiheadAttention)]
    if precision == "fp8":
        _check_fp8(len(plain))
    for block in plain:
        block.attn = Attention(block.attn)
        if precision == "fp8":
            block.attn.inward, block.attn.outward = Linear8(block.attn.inward), Linear8(block.attn.outward)
            for name, part in block.mlp.named_children():
                if isinstance(part, nn.Linear):
                    setattr(block.mlp, name, Linear8(part))


class Attention(nn.Module):
    """Self-attention of a `torch.nn.MultiheadAttention` [n, tokens, width], called as that one is."""

    def __init__(self, old: nn.MultiheadAttention) -> None:
        super().__init__()
        assert old.in_proj_weight is not None and old.batch_first
        self.heads = old.num_heads
        self.inward = _linear(old.in_proj_weight, old.in_proj_bias)
        self.outward = _linear(old.out_proj.weight, old.out_proj.bias)

    def forward(self, x: Any, *_: Any, attn_mask: Any = None, **__: Any) -> tuple[Any, None]:
        """(attended, None). Keys and values are those of `x`."""
        query, key, value = self.inward(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)
        return self.outward(found.transpose(1, 2).flatten(2)), None


class Linear8(nn.Module):
    """A linear layer of float8_e4m3fn weights and inputs: one scale for each output and, found anew each time, each token."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, old: nn.Linear) -> None:
        super().__init__()
        weight, scale = _eight_bits(old.weight.detach())
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale.t().contiguous(), persistent=False)
        self.bias = old.bias

    def forward(self, x: Any) -> Any:
        """bfloat16 [..., inputs] to bfloat16 [..., outputs]."""
        rows, scale = _eight_bits(x.flatten(0, -2))
        if x.is_cuda:
            weight = self.weight.t()
            made = torch._scaled_mm(rows, weight, scale_a=scale, scale_b=self.scale, out_dtype=x.dtype, use_fast_accum=True)
        else:  # the same numbers; a CPU's PyTorch may have one scale for all rows only
            made = (rows.float() @ self.weight.float().t() * scale * self.scale).to(x.dtype)
        # the bias is added apart: torch.compile joins it with what comes next, and not every kernel takes it
        return (made + self.bias).unflatten(0, x.shape[:-1])


def _eight_bits(rows: Any) -> tuple[Any, Any]:
    """(float8 [n, width], float32 [n, 1]): numbers scaled so that the largest of a row is `LARGEST`, and what undoes it."""
    wide = rows.float()
    scale = wide.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (wide / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def _linear(weight: Any, bias: Any) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    made.weight, made.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return made


def _check_fp8(blocks: int) -> None:
    if not blocks:
        raise SurfError(
            "the image tower has none of the blocks that fp8 is for",
            where="embed.precision: fp8",
            expected="one of open_clip's own vision transformers, ViT-L-14 say",
            next="set embed.precision: bf16",
        )
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        raise SurfError(
            f"{torch.cuda.get_device_name()} has no products of 8-bit numbers",
            where="embed.precision: fp8",
            expected="a GPU of compute capability 8.9 or higher (Ada, Hopper)",
            next="set embed.precision: bf16",
        )
