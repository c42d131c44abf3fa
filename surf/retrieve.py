"""The most similar corpus images of every image of one part of `rounds` or `evaluate/questions`.

    python -m surf.retrieve --queries results/rounds/part-….parquet --dataset rounds --index results/index/index.faiss \\
        --embeddings results/embeddings/_manifest.json --catalog results/catalog/_manifest.json --out … --quarantine … FLAGS

Works once for each image, however many questions it has. Copies of the query are left out wherever they rank: by the
photograph's identity (see `surf.images.identity`) and by similarity.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from surf import cli, config, quarantine, search, store
from surf.build_index import to_matrix
from surf.images import Images, identity
from surf.schemas import SCHEMAS
from surf.telemetry import Clock

log = logging.getLogger("surf")
COLUMNS = ["query_id", "rank", "image_id", "similarity"]
SPARE = 16  # neighbours fetched beyond those asked for, so that one search nearly always suffices


def retrieve(
    names: Sequence[str], vectors: np.ndarray, index: Any, corpus: Sequence[str], options: config.Retrieve
) -> pa.Table:
    """Neighbours of the query images, most similar first; ties go to the lower image id.

    Args:
        names: the query images' names.
        vectors: float32 [len(names), dim], L2-normalised.
        index: an index (inner product; see `surf.search.load`) whose ids are positions in `corpus`.
        corpus: the corpus images' names.

    Returns:
        table with the columns of `neighbors`; an image may have fewer than `options.references` if the corpus is small.
    """
    todo = np.arange(len(names))
    fetch = options.references + SPARE
    picked: list[tuple[np.ndarray, ...]] = []
    while len(todo):
        fetch = min(fetch, index.ntotal)
        similarity, ids = index.search(np.ascontiguousarray(vectors[todo]), fetch)
        rows, ranks, hits, scores = pick(
            *_photographs([names[query] for query in todo.tolist()], ids, corpus), ids, similarity, options
        )
        short = np.bincount(rows, minlength=len(todo)) < options.references
        again = short if fetch < index.ntotal else np.zeros(len(todo), bool)
        done = ~again[rows]
        picked.append((todo[rows[done]], ranks[done], hits[done], scores[done]))
        todo, fetch = todo[again], fetch * 4
    columns = [np.concatenate(some) for some in zip(*picked, strict=True)] or [np.array([], np.int64)] * 4
    order = np.lexsort((columns[1], columns[0]))
    query, *rest = (column[order] for column in columns)
    table = pa.table([pa.array(names, pa.string()).take(pa.array(query, pa.int64())), *map(pa.array, rest)], COLUMNS)
    return table.cast(SCHEMAS["neighbors"])


def pick(
    query: np.ndarray, photographs: np.ndarray, ids: np.ndarray, similarity: np.ndarray, options: config.Retrieve
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each query the first `options.references` hits that are neither copies of it nor of each other.

    Args:
        query: number of each query's photograph, int64 [n].
        photographs: number of each hit's photograph, int64 [n, k].
        ids, similarity: the hits, int64 and float32 [n, k]; ids below 0 are none.

    Returns:
        (query 0 to n - 1, rank, image id, similarity) of all that are kept, by query and rank
    """
    order = np.lexsort((ids, -similarity), axis=1)
    ids, similarity, photographs = (np.take_along_axis(of, order, 1) for of in (ids, similarity, photographs))
    fits = (ids >= 0) & (similarity.astype(np.float64) < options.max_similarity) & (photographs != query[:, None])
    # what does not fit hides no other copy of its photograph: it gets a number of its own
    numbers = np.where(fits, photographs, -1 - np.arange(ids.shape[1]))
    by_number = np.argsort(numbers, axis=1, kind="stable")
    sorted_ = np.take_along_axis(numbers, by_number, 1)
    first = np.ones_like(fits)
    first[:, 1:] = sorted_[:, 1:] != sorted_[:, :-1]
    fresh = np.empty_like(first)
    np.put_along_axis(fresh, by_number, first, 1)
    keep = fits & fresh
    ranks = np.cumsum(keep, 1) - 1
    rows, places = np.nonzero(keep & (ranks < options.references))
    return rows, ranks[rows, places], ids[rows, places], similarity[rows, places]


def _photographs(names: Sequence[str], ids: np.ndarray, corpus: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """One number for each photograph (see `identity`): of the queries [n], and of their hits [n, k]."""
    different, place = np.unique(ids, return_inverse=True)
    numbers: dict[str, int] = {}
    hits = [numbers.setdefault(identity(corpus[i]), len(numbers)) if i >= 0 else -1 for i in different.tolist()]
    queries = [numbers.setdefault(identity(name), len(numbers)) for name in names]
    return np.array(queries, np.int64), np.array(hits, np.int64)[place].reshape(ids.shape)


def corpus_vectors(manifest: Path, wanted: Mapping[int, str]) -> dict[str, np.ndarray]:
    """Embeddings that the corpus already has, by query image name; float32 [dim] each. `wanted`: image id to name."""
    found: dict[str, np.ndarray] = {}
    if not wanted:
        return found
    ids = pa.array(sorted(wanted), pa.int64())
    for part in store.parts_of(manifest, "embeddings"):
        table = store.read_table(part, "embeddings")
        table = table.filter(pc.is_in(table["image_id"], value_set=ids))
        table = table.filter(table["embedding"].is_valid())
        if table.num_rows:
            matrix = to_matrix(table["embedding"])
            found.update((wanted[i], row) for i, row in zip(table["image_id"].to_pylist(), matrix, strict=True))
    return found


def main() -> None:
    """Command line."""
    args = cli.parse(
        None,
        prog="retrieve",
        about=__doc__ or "",
        sections=["retrieve", "embed", "images"],
        paths=["queries", "index", "embeddings", "catalog", "out", "quarantine"],
        extras={"dataset": {"required": True, "choices": ["rounds", "evaluate/questions"]}},
    )
    clock = Clock()
    names = sorted(set(store.read_table(args.queries, args.dataset, ["image"])["image"].to_pylist()))
    images = store.read_table(args.catalog, "catalog", ["image"])["image"].combine_chunks()
    first = pc.index_in(pa.array(names, pa.string()), value_set=images).to_pylist()
    known = corpus_vectors(
        args.embeddings, {place: name for place, name in zip(first, names, strict=True) if place is not None}
    )
    others = [name for name in names if name not in known]
    errors: dict[str, str] = {}
    if others:
        from surf.models import clip

        encoder = clip.load(args.embed, Images(args.images.roots, args.images.max_pixels))
        fresh, errors = encoder.encode(others)
        # float16, as the corpus is stored: one image has one vector, wherever it comes from
        fresh = fresh.astype(np.float16).astype(np.float32)
        known.update(zip(others, fresh, strict=True))
    quarantine.settle(
        args.quarantine,
        errors,
        dataset="neighbors",
        stage="retrieve",
        total=len(names),
        max_bad_share=args.images.max_bad_share,
    )
    names = [name for name in names if name not in errors]
    index = search.load(args.index)
    clock.loaded()
    vectors = np.stack([known[name] for name in names]) if names else np.zeros((0, index.d), np.float32)
    table = retrieve(names, vectors, index, images.to_pylist(), args.retrieve)
    flags = cli.flags(retrieve=args.retrieve, embed=args.embed)
    meta = {"stage": "retrieve", "version": args.retrieve.version, "flags": flags}
    store.write_table(args.out, table, "neighbors", meta)
    clock.note(args.out, len(names))
    log.info("%d query images, %d of them in the corpus", len(names), len(known) - len(others))


if __name__ == "__main__":
    cli.run(main)
