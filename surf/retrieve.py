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

from surf import cli, config, quarantine, store
from surf.build_index import to_matrix
from surf.images import Images, identity
from surf.telemetry import Clock

log = logging.getLogger("surf")
SPARE = 16  # neighbours fetched beyond those asked for, so that one search nearly always suffices


def retrieve(
    names: Sequence[str], vectors: np.ndarray, index: Any, corpus: Sequence[str], options: config.Retrieve
) -> pa.Table:
    """Neighbours of the query images, most similar first; ties go to the lower image id.

    Args:
        names: the query images' names.
        vectors: float32 [len(names), dim], L2-normalised.
        index: a FAISS index (inner product) whose ids are positions in `corpus`.
        corpus: the corpus images' names.

    Returns:
        table with the columns of `neighbors`; an image may have fewer than `options.references` if the corpus is small.
    """
    same = [identity(name) for name in corpus]
    todo = list(range(len(names)))
    found: dict[int, list[tuple[int, float]]] = {}
    fetch = options.references + SPARE
    while todo:
        fetch = min(fetch, index.ntotal)
        similarity, ids = index.search(np.ascontiguousarray(vectors[todo]), fetch)
        again = []
        for row, query in enumerate(todo):
            found[query] = _pick(identity(names[query]), ids[row], similarity[row], same, options)
            if len(found[query]) < options.references and fetch < index.ntotal:
                again.append(query)
        todo, fetch = again, fetch * 4
    rows = [
        {"query_id": names[query], "rank": rank, "image_id": image_id, "similarity": similarity}
        for query in range(len(names))
        for rank, (image_id, similarity) in enumerate(found[query])
    ]
    return store.table_of(rows, "neighbors")


def _pick(
    query: str, ids: np.ndarray, similarity: np.ndarray, same: Sequence[str], options: config.Retrieve
) -> list[tuple[int, float]]:
    """The first `options.references` hits that are neither copies of the query nor of each other."""
    hits = sorted((-float(s), int(i)) for s, i in zip(similarity, ids, strict=True) if i >= 0)
    taken = {query}
    picked = []
    for negative, image_id in hits:
        if -negative >= options.max_similarity or same[image_id] in taken:
            continue
        taken.add(same[image_id])
        picked.append((image_id, -negative))
        if len(picked) == options.references:
            break
    return picked


def corpus_vectors(manifest: Path, wanted: Mapping[int, str]) -> dict[str, np.ndarray]:
    """Embeddings that the corpus already has, by query image name; float32 [dim] each. `wanted`: image id to name."""
    found: dict[str, np.ndarray] = {}
    if not wanted:
        return found
    ids = pa.array(sorted(wanted), pa.int64())
    for part in store.parts_of(manifest, "embeddings"):
        table = store.read_table(part, "embeddings")
        table = table.filter(pa.compute.is_in(table["image_id"], value_set=ids))
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
    import faiss

    clock = Clock()
    names = sorted(set(store.read_table(args.queries, args.dataset, ["image"])["image"].to_pylist()))
    corpus = store.read_table(args.catalog, "catalog", ["image"])["image"].to_pylist()
    number = {name: image_id for image_id, name in reversed(list(enumerate(corpus)))}
    known = corpus_vectors(args.embeddings, {number[name]: name for name in names if name in number})
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
    index = faiss.read_index(str(args.index))
    clock.loaded()
    vectors = np.stack([known[name] for name in names]) if names else np.zeros((0, index.d), np.float32)
    table = retrieve(names, vectors, index, corpus, args.retrieve)
    flags = cli.flags(retrieve=args.retrieve, embed=args.embed)
    meta = {"stage": "retrieve", "version": args.retrieve.version, "flags": flags}
    store.write_table(args.out, table, "neighbors", meta)
    clock.note(args.out, len(names))
    log.info("%d query images, %d of them in the corpus", len(names), len(known) - len(others))


if __name__ == "__main__":
    cli.run(main)
