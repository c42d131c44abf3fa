"""The most similar positive and the most similar negative reference of every re-answered round, shard by shard.

Shards are read one at a time, and of each kind of round only as many are kept as can become training samples: memory holds
the columns of one shard, however many rounds there are.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from surf import config, score, store
from surf.errors import SurfError

Row = dict[str, Any]
DATASETS = ("rounds", "scores/answers", "scores/reanswers", "neighbors")
# columns that are read; rounds are read whole, because samples are made of them
COLUMNS = (None, ["round_id", "score", "correct"], ["round_id", "rank", "metric", "score", "correct"], None)


class Labelled(NamedTuple):
    """The re-answered rounds of one shard, as row numbers; -1 where there is no such reference."""

    rounds: np.ndarray  # in `rounds`, ascending
    positive: np.ndarray  # in `scores/reanswers`: the most similar positive reference
    negative: np.ndarray
    gains: np.ndarray  # of every row of `scores/reanswers` over its round's first answer, float64
    right: np.ndarray  # bool: the first answer was right


def gather(
    shards: Iterable[Sequence[Path]], judge: config.Score, order: Callable[[str], int], limit: int
) -> tuple[list[Row], Counter[str]]:
    """Rounds that can become training samples, and how many re-answered rounds there are of each kind.

    Args:
        shards: for each shard its parts of `DATASETS`.
        order: of a round's id; of each kind the first `limit` rounds by (order, id) are kept.

    Returns:
        (rows of `rounds`, each with "positive" and "negative": {image_id, similarity, gain} or None, and whether its first
        answer was "right"; counts of the kinds)
    """
    pools: dict[str, list[tuple[int, str, Row]]] = {}
    counts: Counter[str] = Counter()
    for shard in shards:
        rounds, first, again, near = map(store.read_table, shard, DATASETS, COLUMNS)
        found = label(rounds, first, again, judge)
        ids = rounds["round_id"].take(pa.array(found.rounds)).to_pylist()
        for right, positive, negative in product((False, True), (True, False), (True, False)):
            kind = f"positive {positive}, negative {negative}" + ", right without" * right
            same = (found.right == right) & ((found.positive >= 0) == positive) & ((found.negative >= 0) == negative)
            members = np.flatnonzero(same)
            best = heapq.nsmallest(limit, ((order(ids[member]), ids[member], member) for member in members.tolist()))
            rows = rows_of(found, np.array([member for _, _, member in best], np.int64), rounds, again, near)
            fresh = [(key, round_id, row) for (key, round_id, _), row in zip(best, rows, strict=True)]
            pools[kind] = heapq.nsmallest(limit, [*pools.get(kind, []), *fresh])
            counts[kind] += len(members)
    return [row for pool in pools.values() for _, _, row in pool], +counts


def label(rounds: pa.Table, first: pa.Table, again: pa.Table, judge: config.Score) -> Labelled:
    """The most similar positive and negative reference of every re-answered round of one shard.

    Args:
        rounds, first, again: one shard of `rounds`, `scores/answers` and `scores/reanswers`.

    Raises:
        SurfError: a re-answered round is not among the rounds, or has no first answer.
    """
    row = _find(again["round_id"], rounds["round_id"], "rounds")
    before = _find(again["round_id"], first["round_id"], "scores/answers")
    base = first["score"].to_numpy()[before].astype(np.float64)
    right = first["correct"].cast(pa.int8()).fill_null(0).to_numpy()[before] == 1
    scores = again["score"].to_numpy().astype(np.float64)
    metrics = again["metric"].combine_chunks().dictionary_encode()
    names = np.array(metrics.dictionary.to_pylist(), np.str_)[metrics.indices.to_numpy()]
    kinds = score.labels(names, scores, again["correct"].cast(pa.int8()).fill_null(-1).to_numpy(), base, right, judge)
    order = np.lexsort((again["rank"].to_numpy(), row))
    asked, firsts = np.unique(row, return_index=True)
    positive, negative = (_first(asked, row[order], order, kinds[order] == kind) for kind in (1, 0))
    return Labelled(asked, positive, negative, scores - base, right[firsts])


def rows_of(found: Labelled, which: np.ndarray, rounds: pa.Table, again: pa.Table, near: pa.Table) -> list[Row]:
    """Rows of `rounds` with "right", and "positive", "negative": {image_id, similarity, gain} or None.

    Args:
        which: numbers into the arrays of `found`.

    Raises:
        SurfError: a reference is not among the neighbours of its image.
    """
    rows = store.rows(rounds.take(pa.array(found.rounds[which])))
    near = near.filter(pc.is_in(near["query_id"], value_set=pa.array({row["image"] for row in rows}, pa.string())))
    places = {(place["query_id"], place["rank"]): place for place in store.rows(near)}
    for row, right in zip(rows, found.right[which].tolist(), strict=True):
        row["right"] = right
    for name, numbers in (("positive", found.positive[which]), ("negative", found.negative[which])):
        ranks = again["rank"].take(pa.array(numbers, mask=numbers < 0)).to_pylist()
        for row, rank, number in zip(rows, ranks, numbers.tolist(), strict=True):
            row[name] = None
            if rank is not None:
                place = places.get((row["image"], rank))
                if place is None:
                    raise SurfError(f"{row['image']!r} has no neighbour of rank {rank}", where="neighbors of the round")
                row[name] = {key: place[key] for key in ("image_id", "similarity")} | {"gain": float(found.gains[number])}
    return rows


def _find(ids: pa.ChunkedArray, among: pa.ChunkedArray, dataset: str) -> np.ndarray:
    """Row of each id in the column `among`."""
    found = pc.index_in(ids, value_set=among.combine_chunks())
    if found.null_count:
        stray = ids.filter(found.is_null())[0].as_py()
        raise SurfError(f"{stray!r} was answered again but is not in {dataset}", where="scores/reanswers")
    return found.to_numpy().astype(np.int64)


def _first(asked: np.ndarray, rows: np.ndarray, numbers: np.ndarray, hit: np.ndarray) -> np.ndarray:
    """For each row of `asked` the first of its `numbers` that is a hit, or -1. `rows` is sorted."""
    found, place = np.unique(rows[hit], return_index=True)
    result = np.full(len(asked), -1, np.int64)
    result[np.searchsorted(asked, found)] = numbers[hit][place]
    return result
