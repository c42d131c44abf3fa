"""Which prompts share a prefix, and which of them share a batch. Token ids only: nothing here knows a tensor.

The prefix of a prompt ends with its last image. What stands before the question (system prompt, references, their captions,
the query image) is the same for all questions about one image with the same references, in every layout of `surf.prompts`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

ALIGN = 8  # lengths are rounded up to this: attention kernels want masks of aligned rows
BLOCK = 128  # places of a group in the key-value cache are rounded up to this or more, so that few shapes occur
FULL = 8  # and so are the groups of a batch, where there are more
SHORT = 8  # answers of up to so many tokens are alike in length


@dataclass(frozen=True)
class Group:
    """Prompts with one prefix.

    Attributes:
        prefix: token ids up to the last image, one token an image.
        images: names, in the order of their tokens.
        length: tokens of the prefix when every image takes as many as it needs.
        rows: numbers of the prompts.
        suffixes: of each prompt, the token ids behind the prefix; never empty.
        new: tokens that the longest answer is thought to take.
    """

    prefix: tuple[int, ...]
    images: tuple[str, ...]
    length: int
    rows: tuple[int, ...]
    suffixes: tuple[tuple[int, ...], ...]
    new: int

    @property
    def tokens(self) -> int:
        """Tokens of all suffixes."""
        return sum(map(len, self.suffixes))

    def cut(self, size: int) -> "tuple[Group, Group]":
        """The first `size` prompts and the others."""
        first, second = (
            replace(self, rows=self.rows[part], suffixes=self.suffixes[part]) for part in (slice(size), slice(size, None))
        )
        return first, second


def split(ids: Sequence[int], image: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(prefix, suffix) of a prompt's token ids; the prefix ends with the last `image` token and is empty without one."""
    end = len(ids) - 1
    while end >= 0 and ids[end] != image:
        end -= 1
    return tuple(ids[: end + 1]), tuple(ids[end + 1 :])


def group(
    prompts: Sequence[tuple[int, tuple[int, ...], tuple[int, ...], tuple[str, ...], int]], image: int, image_tokens: int
) -> list[Group]:
    """Groups of prompts with equal prefix and images, sorted so that neighbours have similar shapes, the largest first.

    Args:
        prompts: (number, prefix, suffix, images, new tokens that the answer is thought to take).
        image_tokens: tokens that one image takes.
    """
    found: dict[tuple[tuple[int, ...], tuple[str, ...]], list[tuple[tuple[int, ...], int, int]]] = {}
    for number, prefix, suffix, images, new in prompts:
        found.setdefault((prefix, images), []).append((suffix, number, new))
    groups = []
    for (prefix, images), members in found.items():
        members.sort(key=lambda member: (-len(member[0]), member))
        length = len(prefix) + prefix.count(image) * (image_tokens - 1)
        suffixes, rows = tuple(suffix for suffix, *_ in members), tuple(number for _, number, _ in members)
        groups.append(Group(prefix, images, length, rows, suffixes, max(new for *_, new in members)))
    # a batch goes on until its longest answer is done: answers of similar length come first of all
    groups.sort(
        key=lambda one: (-_doublings(one.new), -up(one.length, BLOCK), -len(one.rows), -one.tokens, -one.length, one.rows)
    )
    return groups


def _doublings(new: int) -> int:
    return max(SHORT - 1, new - 1).bit_length()


def up(number: int, step: int) -> int:
    """`number` rounded up to a multiple of `step`."""
    return -(-number // step) * step


def coarse(number: int, least: int) -> int:
    """`number` rounded up to a multiple of `least`, or to two binary digits behind the first where that is more."""
    return up(number, max(least, 1 << max(0, number.bit_length() - 3)))


def wide(width: int) -> int:
    """Rows of a group while it is decoded: a power of two, or one and a half; few different numbers for the same reason."""
    power = 1 << max(0, (width - 1).bit_length())
    return power * 3 // 4 if width <= power * 3 // 4 and power >= 4 else power


def cost(groups: Sequence[Group]) -> int:
    """Places in the key-value cache that a batch takes, with its padding, if no answer is longer than it is thought to be."""
    prefix = up(max(one.length for one in groups), ALIGN)
    suffix = up(max(one.tokens for one in groups), ALIGN)
    new = wide(max(len(one.rows) for one in groups)) * max(one.new for one in groups)
    return len(groups) * coarse(prefix + suffix + new, BLOCK)


def take(groups: list[Group], budget: int, size: int) -> list[Group]:
    """Take the next batch off the front of `groups`: at most `budget` places and `size` prompts, at least one prompt.

    A group that is too large is cut; the rest of it comes next.
    """
    first = groups.pop(0)
    fitting = min(size, len(first.rows))
    while fitting > 1 and cost([first.cut(fitting)[0]]) > budget:
        fitting -= 1
    if fitting < len(first.rows):
        first, rest = first.cut(fitting)
        groups.insert(0, rest)
        return [first]
    batch = [first]
    while groups:
        more = [*batch, groups[0]]
        if len(more) * max(len(one.rows) for one in more) > size or cost(more) > budget:
            break
        batch.append(groups.pop(0))
    if groups and len(batch) > FULL:
        whole = max(number for number in range(FULL, len(batch) + 1) if coarse(number, FULL) == number)
        groups[:0] = batch[whole:]
        del batch[whole:]
    return batch
