"""Which prompts share a prefix, and which of them share a batch. Token ids only: nothing here knows a tensor.

The prefix of a prompt ends with its last image. What stands before the question (system prompt, references, their captions,
the query image) is the same for all questions about one image with the same references, in every layout of `surf.prompts`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

ALIGN = 8  # lengths are rounded up to this: attention kernels want masks of aligned rows
BLOCK = 128  # places of a batch in the key-value cache are rounded up to this, so that few shapes occur
FULL = 8  # batches have a multiple of this many groups where there are more, for the same reason


@dataclass(frozen=True)
class Group:
    """Prompts with one prefix.

    Attributes:
        prefix: token ids up to the last image, one token an image.
        images: names, in the order of their tokens.
        length: tokens of the prefix when every image takes as many as it needs.
        rows: numbers of the prompts.
        suffixes: of each prompt, the token ids behind the prefix; never empty.
    """

    prefix: tuple[int, ...]
    images: tuple[str, ...]
    length: int
    rows: tuple[int, ...]
    suffixes: tuple[tuple[int, ...], ...]

    def cut(self, size: int) -> "tuple[Group, Group]":
        """The first `size` prompts and the others."""
        first, second = (
            Group(self.prefix, self.images, self.length, self.rows[part], self.suffixes[part])
            for part in (slice(size), slice(size, None))
        )
        return first, second


def split(ids: Sequence[int], image: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(prefix, suffix) of a prompt's token ids; the prefix ends with the last `image` token and is empty without one."""
    end = len(ids) - 1
    while end >= 0 and ids[end] != image:
        end -= 1
    return tuple(ids[: end + 1]), tuple(ids[end + 1 :])


def group(
    prompts: Sequence[tuple[int, tuple[int, ...], tuple[int, ...], tuple[str, ...]]], image: int, image_tokens: int
) -> list[Group]:
    """Groups of prompts with equal prefix and images, sorted so that neighbours have similar shapes, the largest first.

    Args:
        prompts: (number, prefix, suffix, images).
        image_tokens: tokens that one image takes.
    """
    found: dict[tuple[tuple[int, ...], tuple[str, ...]], list[tuple[tuple[int, ...], int]]] = {}
    for number, prefix, suffix, images in prompts:
        found.setdefault((prefix, images), []).append((suffix, number))
    groups = []
    for (prefix, images), members in found.items():
        members.sort(key=lambda member: (-len(member[0]), member))
        length = len(prefix) + prefix.count(image) * (image_tokens - 1)
        rows, suffixes = tuple(number for _, number in members), tuple(suffix for suffix, _ in members)
        groups.append(Group(prefix, images, length, rows, suffixes))
    groups.sort(key=lambda one: (-up(one.length, BLOCK), -len(one.rows), -len(one.suffixes[0]), -one.length, one.rows))
    return groups


def up(number: int, step: int) -> int:
    """`number` rounded up to a multiple of `step`."""
    return -(-number // step) * step


def wide(width: int) -> int:
    """Rows of a group while it is decoded: a power of two, or one and a half; few different numbers for the same reason."""
    power = 1 << max(0, (width - 1).bit_length())
    return power * 3 // 4 if width <= power * 3 // 4 and power >= 4 else power


def cost(groups: Sequence[Group], new_tokens: int) -> int:
    """Places in the key-value cache that a batch takes, with its padding."""
    prefix = up(max(one.length for one in groups), ALIGN)
    width = max(len(one.rows) for one in groups)
    suffix = up(max(len(one.suffixes[0]) for one in groups), ALIGN)
    return len(groups) * up(prefix + width * suffix + wide(width) * new_tokens, BLOCK)


def take(groups: list[Group], new_tokens: int, budget: int, size: int) -> list[Group]:
    """Take the next batch off the front of `groups`: at most `budget` places and `size` prompts, at least one prompt.

    A group that is too large is cut; the rest of it comes next.
    """
    first = groups.pop(0)
    fitting = min(size, len(first.rows))
    while fitting > 1 and cost([first.cut(fitting)[0]], new_tokens) > budget:
        fitting -= 1
    if fitting < len(first.rows):
        first, rest = first.cut(fitting)
        groups.insert(0, rest)
        return [first]
    batch = [first]
    while groups:
        more = [*batch, groups[0]]
        if len(more) * max(len(one.rows) for one in more) > size or cost(more, new_tokens) > budget:
            break
        batch.append(groups.pop(0))
    if groups and len(batch) > FULL:
        whole = len(batch) // FULL * FULL
        groups[:0] = batch[whole:]
        del batch[whole:]
    return batch
