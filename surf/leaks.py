"""Evaluation images among the data that teach: by name, by looks, and by what retrieval already knows of them.

`retrieve` never shows a copy of the query image; what is found here is reported, so that nobody is surprised.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from surf import store
from surf.errors import ImageError
from surf.headers import small
from surf.images import Images, identity

# Copies of one photograph, saved again as JPEG of quality 30 or at half its size, stay below both; tests/unit/test_check.py.
NEAR_BITS = 6  # of 64
NEAR_GREY = 8.0  # mean absolute difference of 32 x 32 grey cells (0-255)


class Pair(NamedTuple):
    """An evaluation image and the image that it was found as."""

    evaluation: str
    other: str


def by_identity(evaluation: Iterable[str], others: Iterable[str]) -> list[Pair]:
    """Evaluation images that are among `others`, as `surf.images.identity` tells photographs apart; one pair each."""
    known: dict[str, str] = {}
    for name in others:
        known.setdefault(identity(name), name)
    return [Pair(name, known[identity(name)]) for name in evaluation if identity(name) in known]


def by_looks(evaluation: Mapping[str, int], others: Mapping[str, int], images: Images) -> list[Pair]:
    """Evaluation images that look like one of `others` under another identity; the most similar one each.

    Args:
        evaluation, others: difference hash (64 bits) by image name. Those within `NEAR_BITS` of each other are opened and
            compared as 32 x 32 grey cells.
    """
    names = list(others)
    hashes = np.array([others[name] for name in names], np.uint64)
    found = []
    for name, value in evaluation.items():
        distance = np.bitwise_count(hashes ^ np.uint64(value))
        close = [names[row] for row in np.flatnonzero(distance <= NEAR_BITS) if identity(names[row]) != identity(name)]
        judged = sorted((_difference(name, other, images), other) for other in close)
        if judged and judged[0][0] <= NEAR_GREY:
            found.append(Pair(name, judged[0][1]))
    return found


def by_neighbors(parts: Sequence[Path], at_least: float) -> tuple[list[tuple[str, float]], float]:
    """(evaluation images whose nearest kept neighbour has a cosine of `at_least` or more, the highest cosine of all)."""
    best: dict[str, float] = {}
    for part in parts:
        table = store.read_table(part, "neighbors", ["query_id", "similarity"])
        for name, similarity in zip(table["query_id"].to_pylist(), table["similarity"].to_pylist(), strict=True):
            best[name] = max(similarity, best.get(name, -1.0))
    return sorted((name, value) for name, value in best.items() if value >= at_least), max(best.values(), default=-1.0)


def _difference(one: str, other: str, images: Images) -> float:
    """Mean absolute difference of two images as 32 x 32 grey cells; infinite if one cannot be read."""
    from PIL import Image

    try:
        cells = [
            np.asarray(small(images.read(name)).resize((32, 32), Image.Resampling.BOX), np.float32) for name in (one, other)
        ]
    except (ImageError, OSError, ValueError):
        return float("inf")
    return float(np.abs(cells[0] - cells[1]).mean())
