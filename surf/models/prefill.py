"""Prompts with a shared prefix through a decoder: the prefix once for each group, then all its suffixes beside each other.

One row of a batch is one group, laid out as

    prefix | suffix of prompt 0 | suffix of prompt 1 | … | new tokens, one of each prompt a step

A token sees the prefix and what belongs to its own prompt, by an attention mask; its position goes on behind the prefix. So
the keys and values of a prefix are held, and read, once for all questions about an image, and nothing is copied.
"""

from collections.abc import Sequence
from typing import Any

from surf.models.prefix import ALIGN, Group, up


class Slots:
    """Keys and values of a batch, in the role of transformers' `Cache`.

    Each layer has one flat buffer that is used again by the batches that follow: addresses stay, so CUDA graphs do too.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.buffers: dict[int, Any] = {}
        self.groups = self.length = 0  # shape in use
        self.least = 0  # places of a new buffer, at least: a buffer that grows leaves holes in the device's memory
        self.moves = 0  # counts new addresses
        self.span: tuple[int, int] | None = None  # where the next tokens go, or
        self.where: Any = None  # the same as a tensor [tokens]

    def update(self, key: Any, value: Any, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Store [groups, heads, tokens, dim] and return all that the tokens may look at."""
        keys, values = self._views(layer, key)
        if self.span is None:
            keys.index_copy_(2, self.where, key)
            values.index_copy_(2, self.where, value)
            return keys, values
        start, end = self.span
        keys[:, :, start:end] = key
        values[:, :, start:end] = value
        if start == 0:
            return key, value
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer: int = 0) -> int:
        """transformers asks for it: every forward pass gets its own positions and mask, so nothing has been seen."""
        return 0

    def get_query_offset(self, layer: int = 0) -> int:
        """See `get_seq_length`."""
        return 0

    def get_mask_sizes(self, tokens: int, layer: int) -> tuple[int, int]:
        """See `get_seq_length`."""
        return tokens, 0

    def regroup(self, kept: Any, used: int, length: int) -> None:
        """Keep the first `used` places of the groups `kept` (int64 array) and make room for `length` places each."""
        import torch

        if length == self.length and len(kept) == self.groups:
            return
        for layer in list(self.buffers):
            buffer = self.buffers[layer]
            _, heads, dim = buffer.shape
            index = torch.from_numpy(kept).to(buffer.device)
            size = self.groups * self.length
            both = [
                part[:size].view(self.groups, heads, self.length, dim)[:, :, :used].index_select(0, index)
                for part in self._split(buffer)
            ]
            del buffer  # the old one goes before a larger one comes
            new = self._room(layer, both[0], len(kept), length)
            for part, old in zip(self._split(new), both, strict=True):
                part[: len(kept) * length].view(len(kept), heads, length, dim)[:, :, :used] = old
        self.groups, self.length = len(kept), length

    def clear(self) -> None:
        """Give the memory back."""
        self.buffers.clear()
        self.moves += 1

    def _views(self, layer: int, like: Any) -> tuple[Any, Any]:
        _, heads, _, dim = like.shape
        buffer = self._room(layer, like, self.groups, self.length)
        first, second = (
            part[: self.groups * self.length].view(self.groups, heads, self.length, dim) for part in self._split(buffer)
        )
        return first, second

    def _split(self, buffer: Any) -> tuple[Any, Any]:
        half = buffer.shape[0] // 2
        return buffer[:half], buffer[half:]

    def _room(self, layer: int, like: Any, groups: int, length: int) -> Any:
        """The layer's buffer [2 x places, heads, dim], a larger one if need be."""
        _, heads, _, dim = like.shape
        buffer = self.buffers.get(layer)
        if buffer is None or buffer.shape[0] < 2 * groups * length:
            self.buffers.pop(layer, None)
            del buffer
            self.moves += 1
            buffer = self.buffers[layer] = like.new_zeros(2 * max(groups * length, self.least), heads, dim)
        return buffer


class Layout:
    """Where the tokens of a batch of groups stand, as tensors on the model's device.

    The suffixes of a group stand one behind the other; only the group's last one is filled up.

    Attributes:
        width: prompts of the widest group; narrower ones are filled up with prompts without a suffix.
        start: places of the prefix; new tokens begin at `end`.
        suffix: places of a group's suffixes.
        first: of each group, where each suffix begins, counted from `start`.
        owner: int64 [groups, suffix], the prompt that a token belongs to, -1 for none.
        order: int64 [groups, suffix], its place in its own suffix.
        lengths, last: int64 [groups, width], tokens of each suffix (0 where there is none), and where its last token stands.
    """

    def __init__(self, batch: Sequence[Group], expanded: Sequence[Sequence[int]], pad: int, device: Any) -> None:
        import numpy as np
        import torch

        self.groups, self.width = len(batch), max(len(one.rows) for one in batch)
        self.start = up(max(one.length for one in batch), ALIGN)
        self.suffix = up(max(one.tokens for one in batch), ALIGN)
        self.end = self.start + self.suffix
        prefix = np.full((self.groups, self.start), pad, np.int64)
        suffix = np.full((self.groups, self.suffix), pad, np.int64)
        owner, order = np.full_like(suffix, -1), np.zeros_like(suffix)
        lengths = np.zeros((self.groups, self.width), np.int64)
        self.first: list[list[int]] = []
        for number, (one, ids) in enumerate(zip(batch, expanded, strict=True)):
            prefix[number, : one.length] = ids
            sizes = [len(tokens) for tokens in one.suffixes]
            lengths[number, : len(sizes)] = sizes
            suffix[number, : one.tokens] = np.concatenate(one.suffixes)
            owner[number, : one.tokens] = np.repeat(np.arange(len(sizes)), sizes)
            order[number, : one.tokens] = np.concatenate([np.arange(size) for size in sizes])
            self.first.append([0, *np.cumsum(sizes)[:-1].tolist()])
        last = np.maximum(np.cumsum(lengths, 1) - 1, 0)
        self.prefix_ids, self.suffix_ids, self.owner, self.order, self.lengths, self.last = (
            torch.from_numpy(of).to(device) for of in (prefix, suffix, owner, order, lengths, last)
        )
        self.prefix_lengths = torch.tensor([one.length for one in batch], device=device)

    def prompt_mask(self, length: int) -> Any:
        """bool [groups, width, length]: the places that a prompt may look at once its suffix is read."""
        import torch

        place = torch.arange(length, device=self.lengths.device)
        mask = (place < self.prefix_lengths[:, None, None]).expand(-1, self.width, -1).clone()
        rows = torch.arange(self.width, device=self.lengths.device)
        mask[:, :, self.start : self.end] = self.owner[:, None] == rows[:, None]
        return mask

    def suffix_mask(self) -> Any:
        """bool [groups, 1, suffix, end]: the prefix, and the tokens before it in its own suffix."""
        import torch

        place = torch.arange(self.start, device=self.lengths.device)
        prefix = (place < self.prefix_lengths[:, None, None]).expand(-1, self.suffix, -1)
        own = (self.owner[:, :, None] == self.owner[:, None]).tril()
        return torch.cat([prefix, own], -1)[:, None]


class Prefill:
    """Reads the prompts of a batch.

    Args:
        model: a transformers image-text-to-text model that `fits`.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.decoder = model, model.model.language_model
        self.embed, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.slots = Slots()

    def prefix(self, layout: Layout, features: Sequence[Any], image: int, length: int) -> None:
        """Read the prefixes. `features` [tokens, hidden] of all images in order; `length`: places of a group in the cache."""
        import torch

        self.slots.groups, self.slots.length, self.slots.span = layout.groups, length, (0, layout.start)
        embeds = self.embed(layout.prefix_ids)
        if features:
            here = (layout.prefix_ids == image).unsqueeze(-1)
            embeds = embeds.masked_scatter(here, torch.cat(list(features)).to(embeds.dtype))
        # Padding stands on the right and nothing looks to its right: the causal mask is enough, and has the fast kernels.
        positions = torch.arange(layout.start, device=embeds.device)[None]
        self.decoder(inputs_embeds=embeds, position_ids=positions, past_key_values=self.slots, use_cache=True)

    def suffix(self, layout: Layout) -> Any:
        """Read the suffixes behind the prefixes: hidden states [groups, suffix, hidden]."""
        self.slots.span = (layout.start, layout.end)
        return self.forward(layout.suffix_ids, layout.prefix_lengths[:, None] + layout.order, layout.suffix_mask())

    def forward(self, ids: Any, positions: Any, mask: Any) -> Any:
        """Hidden states [groups, tokens, hidden] of text tokens."""
        return self.decoder(
            inputs_embeds=self.embed(ids),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.slots,
            use_cache=True,
        ).last_hidden_state
