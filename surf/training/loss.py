"""Cross-entropy on the positions that bear loss, and on no others.

A prompt of three images has some 2,000 tokens, its answer a few. The plain way computes logits for all of them: 2,000 x 32,000
float32 values a sample, several times over.
"""

from collections.abc import Callable
from typing import Any

IGNORED = -100  # label of tokens without loss


def enable(model: Any, chunk: int) -> None:
    """Replace the forward pass of a Hugging Face causal model (`model.model` and output embeddings) by one that trains.

    `chunk`: positions whose logits are in memory at one time.
    """
    from transformers.modeling_outputs import CausalLMOutput

    body, head = model.model, model.get_output_embeddings()
    projected = head.forward

    def forward(*, labels: Any, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        # before the model runs: the host waits here for their number, while nothing is queued that it would have to wait for
        rows, places = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        hidden = body(**inputs, use_cache=False).last_hidden_state
        total = head(hidden[rows, places], labels[rows, places + 1])
        return CausalLMOutput(loss=total / (len(rows) if num_items_in_batch is None else num_items_in_batch))

    def head_forward(hidden: Any, targets: Any) -> Any:
        # inside the head's own call: under ZeRO-3 its weight is gathered here once, however many chunks a process has
        return summed(projected, hidden, targets, chunk)

    model.forward, head.forward = forward, head_forward
    model.accepts_loss_kwargs = True  # the Trainer then passes the number of tokens of all processes


def summed(head: Callable[[Any], Any], hidden: Any, targets: Any, chunk: int) -> Any:
    """Sum of the cross-entropies of `head(hidden)` (positions, vocabulary) and `targets` (positions,), in float32.

    Logits of at most `chunk` positions exist at one time: each chunk's are made again in the backward pass.
    """
    from torch.utils.checkpoint import checkpoint

    if len(targets) <= chunk:
        return _cross_entropy(head, hidden, targets)
    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return sum(checkpoint(_cross_entropy, head, one, wanted, use_reentrant=False) for one, wanted in pieces)


def _cross_entropy(head: Callable[[Any], Any], hidden: Any, targets: Any) -> Any:
    from torch.nn.functional import cross_entropy

    return cross_entropy(head(hidden).float(), targets, reduction="sum")
