"""How sure a number is: cluster bootstrap, grouped jackknife, McNemar's test. Nothing here opens a file."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from surf.shards import stable_hash

BLOCK = 20_000_000  # resampling counts held at a time (160 MB)
GROUPS = 20  # of the jackknife
T_19 = 2.093  # 97.5 % quantile of Student's t with GROUPS - 1 degrees of freedom


class Estimate(NamedTuple):
    """A number and its 95 % interval, None where there are too few images for one."""

    value: float
    low: float | None
    high: float | None


def percentiles(value: float, drawn: np.ndarray) -> Estimate:
    """The interval that holds 95 % of the resampled values; draws that are not defined (NaN) are left out."""
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) == 0 or not math.isfinite(value):
        return Estimate(value, None, None)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


@lru_cache(maxsize=1)  # all that is measured over one set of images shares its draws
def draw(images: int, size: int, seed: int, start: int) -> np.ndarray:
    """How often each image is drawn in resamples `start` to `start + size`: float64 [size, images], rows add up to images."""
    generator = np.random.default_rng([seed, start])
    return generator.multinomial(images, np.full(images, 1 / images), size=size).astype(np.float64)


def ratios(tops: np.ndarray, bottoms: np.ndarray, images: Sequence[str], resamples: int, seed: int) -> list[Estimate]:
    """Ratios of sums, each with the interval of a cluster bootstrap (Cameron, Gelbach and Miller 2008).

    Questions about one image hang together: whole images are drawn with replacement, with all their questions. The draws
    depend on the seed and the set of images alone, so two methods over one set of images are resampled alike, and the
    difference of two scores is such a ratio itself: the sum of the differences over the number of questions.

    Args:
        tops, bottoms: float64 [questions, measures].
        images: the image of each question.
    """
    names, place = np.unique(np.asarray(images, dtype=object).astype(str), return_inverse=True)
    sums = np.zeros((2, len(names), tops.shape[1]))
    np.add.at(sums[0], place, tops)
    np.add.at(sums[1], place, bottoms)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = tops.sum(axis=0) / bottoms.sum(axis=0)
        if len(names) < 2:
            return [Estimate(float(value), None, None) for value in values]
        block = max(1, BLOCK // len(names))
        drawn = []
        for start in range(0, resamples, block):
            counts = draw(len(names), min(block, resamples - start), seed, start)
            drawn.append((counts @ sums[0]) / (counts @ sums[1]))
        found = np.concatenate(drawn)
    return [percentiles(float(value), found[:, column]) for column, value in enumerate(values)]


def jackknife(measure: Callable[[np.ndarray], dict[str, float]], images: Sequence[str]) -> dict[str, Estimate]:
    """Intervals of numbers that are no mean of questions (BLEU, CIDEr): delete a group of images, of 20, and measure again.

    Delete-a-group jackknife (Kott 2001): the interval is value ± t · s.e. with 19 degrees of freedom.

    Args:
        measure: from row numbers (int64) to numbers by name.
    """
    group = np.array([stable_hash("jackknife", image) % GROUPS for image in images])
    rows = np.arange(len(group))
    whole = measure(rows)
    if len(np.unique(group)) < GROUPS:
        return {name: Estimate(value, None, None) for name, value in whole.items()}
    left = [measure(rows[group != number]) for number in range(GROUPS)]
    found = {}
    for name, value in whole.items():
        if any(name not in one for one in left):  # a category whose images are all in one group
            found[name] = Estimate(value, None, None)
            continue
        spread = math.sqrt((GROUPS - 1) / GROUPS * sum((one[name] - value) ** 2 for one in left))
        found[name] = Estimate(value, value - T_19 * spread, value + T_19 * spread)
    return found


def mcnemar(changes: np.ndarray, images: Sequence[str]) -> float:
    """Exact two-sided p of McNemar's test (1947) with images as units: are changes for the better as likely as for the worse?

    The sum of each image's changes gets either sign with probability 1/2; p is the probability of a total at least as far
    from zero as the one found. With one question an image this is McNemar's exact test. Questions on one image, and the same
    question in several splits, do not count as if they were independent.

    Args:
        changes: int64 [questions]: 1 where only the first method is right, -1 where only the second one is, else 0.
        images: the image of each question.
    """
    _, place = np.unique(np.asarray(images, dtype=object).astype(str), return_inverse=True)
    sums = np.bincount(place, weights=changes).astype(np.int64)
    sizes = np.abs(sums[sums != 0])
    reach = int(sizes.sum())
    chances = np.zeros(2 * reach + 1)  # of every total from -reach to reach
    chances[reach] = 1.0
    for size in sizes.tolist():
        moved = np.zeros_like(chances)
        moved[size:] += chances[:-size] / 2
        moved[:-size] += chances[size:] / 2
        chances = moved
    far = np.abs(np.arange(-reach, reach + 1)) >= abs(int(sums.sum()))
    return min(1.0, float(chances[far].sum()))
