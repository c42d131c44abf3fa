"""Build the FAISS index over all embeddings.

    python -m surf.build_index --embeddings results/embeddings/_manifest.json --out results/index/index.faiss FLAGS

Inner product on unit vectors is the cosine; ids are the catalog's image ids.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from surf import cli, config, store
from surf.errors import SurfError

log = logging.getLogger("surf")
TRAINING_VECTORS = 1_000_000  # at most; more does not move k-means centroids


def build_index(manifest: Path, options: config.BuildIndex, seed: int) -> tuple[Any, dict[str, Any]]:
    """The index, and what `index.json` says of it: {ntotal, dim, metric, factory, embeddings}.

    Raises:
        SurfError: no image could be embedded, or FAISS does not know the factory string.
    """
    import faiss

    parts = store.parts_of(manifest, "embeddings")
    dim = store.read_table(parts[0], "embeddings").schema.field("embedding").type.list_size
    try:
        inner = faiss.index_factory(dim, options.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        message = str(error).splitlines()[-1]
        raise SurfError(
            f"FAISS refuses it ({message})",
            where=f"build_index.factory = {options.factory!r}",
            expected="e.g. Flat or IVF1024,SQ8",
        ) from None
    index = faiss.IndexIDMap2(inner)
    if not inner.is_trained:
        inner.train(_sample(parts, seed))
    for (part,) in cli.chunks(parts, 1, desc="build_index", unit="part"):
        ids, vectors = read_vectors(part)
        if len(ids):
            index.add_with_ids(vectors, ids)
    if index.ntotal == 0:
        raise SurfError("not one image could be embedded", where=str(manifest), next="see results/quarantine/embeddings")
    about = {
        "ntotal": index.ntotal,
        "dim": dim,
        "metric": "inner_product",
        "factory": options.factory,
        "embeddings": store.read_json(manifest)["parts"],
    }
    return index, about


def read_vectors(part: Path) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64 [n], vectors float32 [n, dim]) of the readable images of one part of `embeddings`."""
    table = store.read_table(part, "embeddings")
    table = table.filter(table["embedding"].is_valid())
    return table["image_id"].to_numpy(), to_matrix(table["embedding"])


def to_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """float32 [n, dim] from a column of fixed-size float16 lists without nulls."""
    array = column.combine_chunks()
    values = array.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return values.reshape(len(array), array.type.list_size)


def _sample(parts: list[Path], seed: int) -> np.ndarray:
    per_part = -(-TRAINING_VECTORS // len(parts))
    rng = np.random.default_rng(seed)
    chosen = []
    for part in parts:
        vectors = read_vectors(part)[1]
        chosen.append(vectors[np.sort(rng.permutation(len(vectors))[:per_part])])
    return np.concatenate(chosen)


def main() -> None:
    """Command line."""
    args = cli.parse(
        None,
        prog="build_index",
        about=__doc__ or "",
        sections=["build_index"],
        paths=["embeddings", "out"],
        extras={"seed": {"type": int, "default": 0}},
    )
    import faiss

    index, about = build_index(args.embeddings, args.build_index, args.seed)
    with store.replacing(args.out) as temporary:
        faiss.write_index(index, str(temporary))
    store.write_json(args.out.with_suffix(".json"), about)
    log.info("%d vectors of %d dimensions", about["ntotal"], about["dim"])


if __name__ == "__main__":
    cli.run(main)
