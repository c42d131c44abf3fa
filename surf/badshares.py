"""Shares of unreadable images, part by part: a stage stops by the share of its own part, not by that of all data."""

from collections.abc import Container, Sequence
from typing import NamedTuple

from surf.shards import part_names, row_range, shard_of


class Part(NamedTuple):
    """Unusable ones among the `total` rows or images that a stage looks at in one part."""

    stage: str
    name: str
    bad: int
    total: int


def corpus(names: Sequence[str], errors: Container[str], count: int) -> list[Part]:
    """What `embed` will count in each of `count` parts; `names`: the image of each row of the catalog."""
    parts = []
    for index, name in enumerate(part_names(count)):
        rows = row_range(len(names), index, count)
        own = names[rows.start : rows.stop]
        parts.append(Part("embed", name, len({one for one in own if one in errors}), len(own)))
    return parts


def rounds(names: Sequence[str], errors: Container[str], count: int) -> list[Part]:
    """What `answer` (rounds) and `retrieve` (images) will count in each of `count` parts; `names`: the image of each round."""
    own: list[list[str]] = [[] for _ in range(count)]
    for name in names:
        own[shard_of(name, count)].append(name)
    parts = []
    for name, images in zip(part_names(count), own, strict=True):
        for stage, looked in (("answer", images), ("retrieve", list(dict.fromkeys(images)))):
            parts.append(Part(stage, name, sum(one in errors for one in looked), len(looked)))
    return parts


def worst(parts: Sequence[Part]) -> Part:
    """The part with the largest share."""
    return max(parts, key=lambda part: part.bad / max(part.total, 1))
