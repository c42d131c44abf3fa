"""Choose the training samples: the most similar positive and the most similar negative reference of a round.

    python -m surf.pair --rounds M --scores-answers M --scores-reanswers M --neighbors M --reanswers M --catalog M \\
        --out results/pairs.parquet --json results/pairs.json FLAGS        (M: the datasets' manifests)

Goes through the shards one by one; which samples are kept depends on the seed and the rounds alone.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from surf import cli, config, prompts, score, store
from surf.errors import SurfError
from surf.reanswer import lookup
from surf.shards import stable_hash

log = logging.getLogger("surf")
Row = dict[str, Any]
KINDS = ("pair", "positive_only", "negative_only", "no_reference")


def label(
    rounds: Sequence[Row], first: Sequence[Row], again: Sequence[Row], near: Sequence[Row], judge: config.Score
) -> Iterator[Row]:
    """Every re-answered round with its most similar positive and most similar negative reference, or None.

    Args:
        rounds, first, again, near: rows of one shard of `rounds`, `scores/answers`, `scores/reanswers` and `neighbors`.

    Yields:
        the round's row and "positive", "negative": {image_id, similarity, gain} or None; gain is over the first answer's score.
    """
    base = {row["round_id"]: row["score"] for row in first}
    places = {(row["query_id"], row["rank"]): row for row in near}
    judged: dict[str, list[Row]] = {}
    for row in again:
        judged.setdefault(row["round_id"], []).append(row)
    for one in rounds:
        best: dict[bool, Row] = {}
        for row in sorted(judged.get(one["round_id"], ()), key=lambda row: row["rank"]):
            before = base[one["round_id"]]
            kind = score.label(row["metric"], row["score"], row["correct"], before, judge)
            if kind is not None and kind not in best:
                place = places[one["image"], row["rank"]]
                gain = row["score"] - before
                best[kind] = {"image_id": place["image_id"], "similarity": place["similarity"], "gain": gain}
        if one["round_id"] in judged:
            yield {**one, "positive": best.get(True), "negative": best.get(False)}


def choose(labelled: Sequence[Row], options: config.Pair, seed: int) -> list[Row]:
    """At most `options.samples` training samples, in an order drawn by the seed, mixed as `options.mix` says.

    pair: rounds with both kinds. positive_only and negative_only: rounds with just that kind first, then rounds with both
    that no pair uses. no_reference: any labelled round that is left. Too few of a kind is logged, never filled up with another.
    """
    ordered = sorted(labelled, key=lambda row: (stable_hash(seed, "pair", row["round_id"]), row["round_id"]))
    mix = options.mix
    both = [row for row in ordered if row["positive"] and row["negative"]]
    rest = 1 - mix.positive_only - mix.negative_only - mix.no_reference
    total = options.samples
    if options.rounds == "both":
        ordered = both
        total = min(total, len(both))
    if rest > 1e-9:
        total = min(total, int(len(both) / rest + 1e-9))
    wanted = {
        "positive_only": round(total * mix.positive_only),
        "negative_only": round(total * mix.negative_only),
        "no_reference": round(total * mix.no_reference),
    }
    wanted = {"pair": total - sum(wanted.values()), **wanted}
    used: set[str] = set()
    chosen = []
    for kind in KINDS:
        pool = [row for row in _pool(kind, ordered) if row["round_id"] not in used][: max(0, wanted[kind])]
        if len(pool) < wanted[kind]:
            log.warning("pair.mix: %d of %d samples of kind %s to be had", len(pool), wanted[kind], kind)
        used |= {row["round_id"] for row in pool}
        chosen += [_sample(row, kind, options, seed) for row in pool]
    return sorted(chosen, key=lambda row: (stable_hash(seed, "order", row["round_id"]), row["round_id"]))


def original_json(row: Row) -> Row:
    """One sample in the original README's format: {id, image, conversations, images, labels}."""
    references = ordered_references(row)
    shown = [prompts.Reference(ref["image"], ref["caption"]) for _, ref in references]
    prompt = prompts.build(row["question"], row["image"], shown, caption_chars=10**9)
    return {
        "id": row["round_id"],
        "image": row["image"],
        "conversations": [{"from": "human", "value": prompt.text}, {"from": "gpt", "value": row["answer"]}],
        "images": [reference.image for reference in shown],
        "labels": [int(positive) for positive, _ in references],
    }


def ordered_references(row: Row) -> list[tuple[bool, Row]]:
    """(is it the positive one, reference) of a row of `pairs`, in the order in which they stand in the prompt."""
    both = [(True, row["positive"]), (False, row["negative"])]
    if not row["positive_first"]:
        both.reverse()
    return [(positive, reference) for positive, reference in both if reference is not None]


def _pool(kind: str, ordered: Sequence[Row]) -> list[Row]:
    both = [row for row in ordered if row["positive"] and row["negative"]]
    if kind == "pair":
        return both
    if kind == "positive_only":
        return [row for row in ordered if row["positive"] and not row["negative"]] + both
    if kind == "negative_only":
        return [row for row in ordered if row["negative"] and not row["positive"]] + both
    return list(ordered)


def _sample(row: Row, kind: str, options: config.Pair, seed: int) -> Row:
    keep = {
        "pair": (True, True),
        "positive_only": (True, False),
        "negative_only": (False, True),
        "no_reference": (False, False),
    }
    positive, negative = keep[kind]
    first = options.order == "positive_first" or stable_hash(seed, "first", row["round_id"]) % 2 == 0
    return {
        **row,
        "kind": kind,
        "positive_first": first,
        "positive": row["positive"] if positive else None,
        "negative": row["negative"] if negative else None,
    }


def main() -> None:
    """Command line."""
    datasets = {
        "rounds": "rounds",
        "scores_answers": "scores/answers",
        "scores_reanswers": "scores/reanswers",
        "neighbors": "neighbors",
    }
    args = cli.parse(
        None,
        prog="pair",
        about=__doc__ or "",
        sections=["pair", "score"],
        paths=[*datasets, "catalog", "out", "json"],
        extras={"seed": {"type": int, "default": 0}},
    )
    parts = [store.parts_of(getattr(args, name), dataset) for name, dataset in datasets.items()]
    labelled: list[Row] = []
    counts: Counter[str] = Counter()
    for (shard,) in cli.chunks(list(zip(*parts, strict=True)), 1, desc="pair", unit="shard"):
        tables = [store.rows(store.read_table(path, dataset)) for path, dataset in zip(shard, datasets.values(), strict=True)]
        for row in label(tables[0], tables[1], tables[2], tables[3], args.score):
            labelled.append(row)
            counts[f"positive {bool(row['positive'])}, negative {bool(row['negative'])}"] += 1
    for what, number in sorted(counts.items()):
        log.info("%d re-answered rounds with %s", number, what)
    chosen = choose(labelled, args.pair, args.seed)
    if not chosen:
        raise SurfError(
            f"not one of {len(labelled)} re-answered rounds has both a positive and a negative reference",
            where=str(args.rounds.parent.parent),
            expected="at least one pair",
            next="more rounds (split.limit), more references (reanswer.references), or shares in pair.mix",
        )
    ids = {row[kind]["image_id"] for row in chosen for kind in ("positive", "negative") if row[kind]}
    found = lookup(args.catalog, ids)
    for row in chosen:
        for kind in ("positive", "negative"):
            if row[kind]:
                reference = found[row[kind]["image_id"]]
                row[kind] = {**row[kind], "image": reference.image, "caption": reference.caption}
    flags = cli.flags(pair=args.pair, score=args.score)
    meta = {"stage": "pair", "version": args.pair.version, "flags": flags, "counts": dict(sorted(counts.items()))}
    store.write_table(args.out, store.table_of(chosen, "pairs"), "pairs", meta)
    store.write_json_rows(args.json, [original_json(row) for row in chosen])
    log.info("%d training samples: %s", len(chosen), dict(Counter(row["kind"] for row in chosen)))


if __name__ == "__main__":
    cli.run(main)
