"""What stands between the matrix products, compiled: norms, gated activations and rotary positions in one kernel each.

Eager, they read and write memory some twenty times where two or three would do, forward and backward. Only functions of tensors
are compiled, never modules: nothing depends on a layer or on how ZeRO keeps its weights, and each function is compiled once for
all layers and all lengths. What the backward pass needs beyond the inputs is computed again there.

Modules are recognised by their attributes, and replaced only if they compute what the function here computes.
"""

import logging
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

log = logging.getLogger("surf")

ROTARY = "apply_rotary_pos_emb"  # its name in all of transformers' modeling modules
BACKEND = "inductor"  # of torch.compile
TOKENS = {"cuda": 8192, "cpu": 64}  # of the first call: kernels are laid out for about so many, and right for any number


def rms_norm(hidden: Any, weight: Any, eps: float) -> Any:
    """(tokens, width), (width,) -> (tokens, width)."""
    wide = hidden.float()
    wide = wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return weight * wide.to(hidden.dtype)


def swiglu(gate: Any, up: Any) -> Any:
    """(tokens, width) each."""
    from torch.nn.functional import silu

    return silu(gate) * up


def rotary(query: Any, key: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
    """Two of (tokens, heads, size), two of (tokens, size) -> the first two, rotated."""
    import torch

    def turned(one: Any) -> Any:
        left, right = one.chunk(2, -1)
        return one * cos[:, None] + torch.cat((-right, left), -1) * sin[:, None]

    return turned(query), turned(key)


def enable(text: Any, layers: list[Any], *, train: bool = True) -> bool:
    """Let the language model `text` and its `layers` use the compiled functions; returns whether they can be compiled.

    If not (no compiler, no Triton), the log says so in one line and nothing is changed.

    Args:
        train: else they are called in inference mode only.
    """
    import torch

    disable(text)  # the rotation is shared by all models of a family
    norms, blocks, left = [], [], set()
    with torch.random.fork_rng(devices=[]):  # the comparisons leave the training's random numbers alone
        for module in text.modules():
            if _is_norm(module):
                norms.append(module)
            elif _is_swiglu(module):
                blocks.append(module)
            elif re.search(r"(Norm|MLP)$", type(module).__name__):
                left.add(type(module).__name__)
        homes = [home for home in _homes(layers) if _is_rotary(getattr(home, ROTARY))]
    try:
        _warm_up(text, norms, blocks, bool(homes), train)
    except Exception as error:  # no compiler, an old driver: many kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        log.warning("nothing is compiled (%s): slower, equal results", reason)
        return False
    for module in norms:
        module.forward = partial(_norm_forward, module)
    for module in blocks:
        module.forward = partial(_block_forward, module)
    for home in homes:
        setattr(home, ROTARY, _rotary(getattr(home, ROTARY)))
    found = f"{len(norms)} norms, {len(blocks)} feed-forward blocks, {'' if homes else 'no '}rotary positions"
    log.info("compiled: %s%s", found, f"; as they are: {', '.join(sorted(left))}" if left else "")
    return True


def disable(model: Any) -> None:
    """Everything as transformers has it."""
    for module in model.modules():
        own = module.__dict__.get("forward")
        if isinstance(own, partial) and own.func in (_norm_forward, _block_forward):
            del module.forward
    for home in _homes(model.modules()):
        setattr(home, ROTARY, getattr(getattr(home, ROTARY), "surf_plain", getattr(home, ROTARY)))


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled once a process."""
    import torch

    # which sizes vary is seen by `_warm_up`'s marks: the number of tokens; with dynamic=True widths would be variables as well
    return torch.compile(function, backend=BACKEND)


def _norm_forward(module: Any, hidden: Any) -> Any:
    return compiled(rms_norm)(hidden.flatten(0, -2), module.weight, module.variance_epsilon).view(hidden.shape)


def _block_forward(module: Any, hidden: Any) -> Any:
    gate, up = module.gate_proj(hidden), module.up_proj(hidden)
    return module.down_proj(compiled(swiglu)(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape))


def _rotary(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`rotary` with the signature of `plain`: two of (batch, heads, tokens, size), two of (batch or 1, tokens, size)."""

    def turn(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        if unsqueeze_dim != 1 or q.dim() != 4 or cos.dim() != 3 or cos.shape[-1] != q.shape[-1]:
            return plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        batch, _, tokens, size = q.shape
        # (batch, tokens, heads, size) is how the projections have left them: no copies
        flat = [one.transpose(1, 2).reshape(batch * tokens, -1, size) for one in (q, k)]
        angles = [one.expand(batch, -1, -1).reshape(batch * tokens, size) for one in (cos, sin)]
        turned = compiled(rotary)(*flat, *angles)
        return tuple(one.view(batch, tokens, -1, size).transpose(1, 2) for one in turned)

    turn.surf_plain = plain  # type: ignore[attr-defined]
    return turn


# --- what can be replaced ----------------------------------------------------------------------------------------------


def _is_norm(module: Any) -> bool:
    import torch

    if not all(hasattr(module, name) for name in ("weight", "variance_epsilon")) or "forward" in module.__dict__:
        return False
    hidden, weight = torch.randn(3, 5, 16), torch.nn.Parameter(torch.randn(16))
    expected = _forward(module, hidden, parameters={"weight": weight})
    return _close(expected, rms_norm(hidden, weight, module.variance_epsilon))


def _is_swiglu(module: Any) -> bool:
    import torch

    if (
        not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))
        or "forward" in module.__dict__
    ):
        return False
    shapes = {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}
    parts = {name: torch.nn.Linear(*shape, bias=False) for name, shape in shapes.items()}
    hidden = torch.randn(3, 5, 8)
    expected = _forward(module, hidden, modules={**parts, "act_fn": module.act_fn})
    return _close(expected, parts["down_proj"](swiglu(parts["gate_proj"](hidden), parts["up_proj"](hidden))))


def _is_rotary(plain: Callable[..., Any]) -> bool:
    import torch

    if hasattr(plain, "surf_plain"):
        return False
    query, key, cos, sin = torch.randn(4, 3, 5, 8), torch.randn(4, 1, 5, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    try:
        expected = plain(query, key, cos, sin)
    except Exception:  # other arguments
        return False
    found = rotary(query[0].transpose(0, 1), key[0].transpose(0, 1), cos[0], sin[0])
    return all(_close(one[0].transpose(0, 1), other) for one, other in zip(expected, found, strict=True))


def _forward(module: Any, hidden: Any, parameters: Any = None, modules: Any = None) -> Any:
    """What the module's class computes with other weights: its own may be spread over processes. None if it cannot."""
    other = object.__new__(type(module))
    other.__dict__ = {**module.__dict__, "_parameters": parameters or {}, "_modules": modules or {}}
    try:
        return type(module).forward(other, hidden)
    except Exception:  # it needs what our stand-in lacks
        return None


def _close(one: Any, other: Any) -> bool:
    import torch

    return isinstance(one, torch.Tensor) and one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def _homes(modules: Any) -> Iterator[Any]:
    """The modeling modules in which these modules, or their attention, look up the rotation."""
    classes = {type(part) for module in modules for part in (module, getattr(module, "self_attn", None))}
    for name in sorted({one.__module__ for one in classes}):
        if hasattr(home := sys.modules[name], ROTARY):
            yield home


# --- the first call ----------------------------------------------------------------------------------------------------


def _warm_up(text: Any, norms: list[Any], blocks: list[Any], rotates: bool, train: bool) -> None:
    """Compile now, forward and in training backward, for each kind of tensors that the model will bring."""
    import torch

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    tokens = TOKENS[device.type]

    def made(*shape: int, dtype: Any, grad: bool = True) -> Any:
        with torch.inference_mode(not train):
            tensor = torch.ones(tokens, *shape, dtype=dtype, device=device, requires_grad=grad and train)
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return tensor

    def run(function: Callable[..., Any], *inputs: Any) -> None:
        with torch.inference_mode(not train):
            found = compiled(function)(*inputs)
        if not train:
            return
        parts = found if isinstance(found, tuple) else (found,)
        torch.autograd.backward(parts, [torch.ones_like(part) for part in parts])

    kinds = {(_width(one.weight), one.weight.dtype, one.weight.requires_grad, one.variance_epsilon) for one in norms}
    dtype = next((kind[1] for kind in kinds), torch.float32)
    for width, kind, grad, eps in kinds:
        weight = torch.nn.Parameter(torch.ones(width, dtype=kind, device=device), requires_grad=grad)
        run(rms_norm, made(width, dtype=kind), weight, eps)
    for width in {int(one.gate_proj.out_features) for one in blocks}:
        run(swiglu, made(width, dtype=dtype), made(width, dtype=dtype))
    if rotates:
        options = text.config.get_text_config()
        size = getattr(options, "head_dim", None) or options.hidden_size // options.num_attention_heads
        heads = (options.num_attention_heads, options.num_key_value_heads)
        vectors = [made(count, size, dtype=dtype) for count in heads]
        run(rotary, *vectors, *(made(size, dtype=dtype, grad=False) for _ in range(2)))
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _width(weight: Any) -> int:
    return int(getattr(weight, "ds_shape", weight.shape)[-1])  # ZeRO-3 leaves an empty shell of a parameter
