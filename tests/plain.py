"""Plain loops that say what the fast code must give. Tests compare with them; benchmarks time them beside it."""

from collections.abc import Iterator, Sequence
from typing import Any

from surf import config, score
from surf.images import identity

Row = dict[str, Any]


def label(
    rounds: Sequence[Row], first: Sequence[Row], again: Sequence[Row], near: Sequence[Row], judge: config.Score
) -> Iterator[Row]:
    """Every re-answered round with its "positive" and "negative" reference or None, from the rows of one shard.

    "right" says whether its first answer was.
    """
    firsts = {row["round_id"]: (row["score"], row["correct"] is True) for row in first}
    places = {(row["query_id"], row["rank"]): row for row in near}
    judged: dict[str, list[Row]] = {}
    for row in again:
        judged.setdefault(row["round_id"], []).append(row)
    for one in rounds:
        best: dict[bool, Row] = {}
        for row in sorted(judged.get(one["round_id"], ()), key=lambda row: row["rank"]):
            before, right = firsts[one["round_id"]]
            kind = score.label(row["metric"], row["score"], row["correct"], before, right, judge)
            if kind is not None and kind not in best:
                place = places[one["image"], row["rank"]]
                gain = row["score"] - before
                best[kind] = {"image_id": place["image_id"], "similarity": place["similarity"], "gain": gain}
        if one["round_id"] in judged:
            yield {**one, "right": firsts[one["round_id"]][1], "positive": best.get(True), "negative": best.get(False)}


def pick(
    query: str, ids: Sequence[int], similarity: Sequence[float], corpus: Sequence[str], options: config.Retrieve
) -> list[tuple[int, float]]:
    """(image id, similarity) of the first hits that are neither copies of the query nor of each other."""
    hits = sorted((-float(s), int(i)) for s, i in zip(similarity, ids, strict=True) if i >= 0)
    taken = {identity(query)}
    picked = []
    for negative, image_id in hits:
        if -negative < options.max_similarity and identity(corpus[image_id]) not in taken:
            taken.add(identity(corpus[image_id]))
            picked.append((image_id, -negative))
    return picked[: options.references]
