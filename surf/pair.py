"""Choose the training samples: the most similar positive and the most similar negative reference of a round.

    python -m surf.pair --rounds M --scores-answers M --scores-reanswers M --neighbors M --catalog M \\
        --unreadable Q… --out results/pairs.parquet --json results/pairs.json FLAGS
        (M: the datasets' manifests; Q: quarantine of the embeddings)

Which samples are kept depends on the seed and the rounds alone, not on the shards.
"""

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from surf import cli, config, labels, prompts, store
from surf.errors import SurfError
from surf.images import identity
from surf.reanswer import lookup
from surf.shards import stable_hash

log = logging.getLogger("surf")
Row = dict[str, Any]
KINDS = ("pair", "positive_only", "negative_only", "no_reference")
DRAWS = 1000  # of a random negative, before the corpus is held to be too small


def choose(labelled: Sequence[Row], options: config.Pair, seed: int) -> list[Row]:
    """At most `options.samples` training samples, in an order drawn by the seed, mixed as `options.mix` says.

    The share `options.harmed` of them comes from rounds that are right without references, mixed likewise, and is kept where
    there are few of the others; too few of such rounds are logged.

    pair: rounds with both kinds. positive_only and negative_only: rounds with just that kind first, then rounds with both
    that no pair uses. no_reference: any labelled round that is left. Too few of a kind is logged, never filled up with another.
    """
    harmed = round(options.samples * options.harmed)
    chosen = _choose([row for row in labelled if not row["right"]], options.samples - harmed, options, seed)
    if options.harmed < 1:
        harmed = min(harmed, round(len(chosen) * options.harmed / (1 - options.harmed)))
    if harmed:
        more = _choose([row for row in labelled if row["right"]], harmed, options, seed)
        if len(more) < harmed:
            log.warning("pair.harmed: %d of %d samples of rightly answered rounds to be had", len(more), harmed)
        chosen += more
    return sorted(chosen, key=lambda row: (stable_hash(seed, "order", row["round_id"]), row["round_id"]))


def _choose(labelled: Sequence[Row], total: int, options: config.Pair, seed: int) -> list[Row]:
    """At most `total` samples of these rounds, mixed as `options.mix` says."""
    ordered = sorted(labelled, key=lambda row: (order(row["round_id"], seed), row["round_id"]))
    mix = options.mix
    both = [row for row in ordered if row["positive"] and row["negative"]]
    rest = 1 - mix.positive_only - mix.negative_only - mix.no_reference
    if options.rounds == "both":
        ordered = both
        total = min(total, len(both))
    if rest > 1e-9:
        total = min(total, int(len(both) / rest + 1e-9))
    shares = (mix.positive_only, mix.negative_only, mix.no_reference)
    edges = [0, *(round(total * share) for share in accumulate(shares))]
    if rest <= 1e-9:
        edges[-1] = total
    counts = [end - start for start, end in pairwise([*edges, total])]  # rounded together: they add up
    wanted = {"pair": counts[-1], **dict(zip(("positive_only", "negative_only", "no_reference"), counts, strict=False))}
    used: set[str] = set()
    chosen = []
    for kind in KINDS:
        pool = [row for row in _pool(kind, ordered) if row["round_id"] not in used][: wanted[kind]]
        if len(pool) < wanted[kind]:
            log.warning("pair.mix: %d of %d samples of kind %s to be had", len(pool), wanted[kind], kind)
        used |= {row["round_id"] for row in pool}
        chosen += [_sample(row, kind, options, seed) for row in pool]
    return chosen


def order(round_id: str, seed: int) -> int:
    """Rounds with low numbers become samples first."""
    return stable_hash(seed, "pair", round_id)


def random_negatives(chosen: Sequence[Row], corpus: Sequence[str], unreadable: Collection[str], seed: int) -> None:
    """Put a random corpus image in the place of every negative reference of `chosen`.

    It is another photograph than the round's own and the positive one. Its similarity and gain are unknown: null.

    Args:
        corpus: image names by image id.
        unreadable: images that are never drawn.

    Raises:
        SurfError: the corpus is too small.
    """
    for row in chosen:
        if row["negative"]:
            taken = {identity(row["image"])} | ({identity(corpus[row["positive"]["image_id"]])} if row["positive"] else set())
            draws = (stable_hash(seed, "negative", row["round_id"], draw) % len(corpus) for draw in range(DRAWS))
            fitting = (i for i in draws if identity(corpus[i]) not in taken and corpus[i] not in unreadable)
            image_id = next(fitting, None)
            if image_id is None:
                raise SurfError(
                    f"no random negative for {row['image']!r} among {len(corpus)} corpus images",
                    where="pair.negatives",
                    expected="a corpus with other photographs",
                    next="set pair.negatives to hard, or add captions to catalog.captions",
                )
            row["negative"] = {"image_id": image_id, "similarity": None, "gain": None}


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
    datasets = [name.replace("/", "_") for name in labels.DATASETS]
    args = cli.parse(
        None,
        prog="pair",
        about=__doc__ or "",
        sections=["pair", "score"],
        paths=[*datasets, "catalog", "out", "json"],
        extras={
            "seed": {"type": int, "default": 0},
            "unreadable": {"type": Path, "nargs": "*", "default": [], "help": "what --pair.negatives random leaves out"},
        },
    )
    parts = [store.parts_of(getattr(args, name), dataset) for name, dataset in zip(datasets, labels.DATASETS, strict=True)]
    shards = cli.chunks(list(zip(*parts, strict=True)), 1, desc="pair", unit="shard")
    labelled, counts = labels.gather(
        (shard for (shard,) in shards), args.score, lambda round_id: order(round_id, args.seed), args.pair.samples
    )
    for what, number in sorted(counts.items()):
        log.info("%d re-answered rounds with %s", number, what)
    chosen = choose(labelled, args.pair, args.seed)
    if not chosen:
        raise SurfError(
            f"not one of {sum(counts.values())} re-answered rounds has both a positive and a negative reference",
            where=str(args.rounds.parent.parent),
            expected="at least one pair",
            next="more rounds (split.limit), more references (reanswer.references), or shares in pair.mix",
        )
    if args.pair.negatives == "random":
        corpus = store.read_table(args.catalog, "catalog", ["image"])["image"].to_pylist()
        unreadable = {row["key"] for path in args.unreadable for row in store.rows(store.read_table(path, "quarantine"))}
        random_negatives(chosen, corpus, unreadable, args.seed)
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
