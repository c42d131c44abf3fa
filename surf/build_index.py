"""Build the FAISS index over all embeddings.

    python -m surf.build_index --embeddings results/embeddings/_manifest.json --out results/index/index.faiss FLAGS

Inner product on unit vectors is the cosine; ids are the catalog's image ids.
"""

import hashlib
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from surf import cli, config, search, store
from surf.errors import SurfError
from surf.telemetry import Clock

log = logging.getLogger("surf")
GIB = 2**30
FLAT_BYTES = 16 * GIB  # auto: float32 vectors up to here are kept as they are
SQ8_BYTES = 128 * GIB  # auto: 8-bit codes up to here
DISK_BYTES = 16 * GIB  # codes beyond this are merged into a file that searches map into memory
TRAINING_VECTORS = 50  # for each inverted list; FAISS asks for 39 at least
FLAT_TRAINING = 100_000  # for what is trained without inverted lists
RECALL_QUERIES = 1000


def build_index(manifest: Path, options: config.BuildIndex, seed: int, out: Path) -> tuple[Any, dict[str, Any]]:
    """The index, and what `index.json` says of it: {ntotal, dim, metric, factory, probes, recall_at_10, embeddings}.

    A large index is built from one part of the embeddings at a time. Its codes then lie in `out` with suffix .ivfdata, and the
    parts that are finished in `_partial/` beside it, so that a killed job goes on.

    Raises:
        SurfError: no image could be embedded, or FAISS does not know the factory string.
    """
    parts = store.parts_of(manifest, "embeddings")
    dim = pq.read_schema(parts[0]).field("embedding").type.list_size
    about = store.read_json(manifest)
    factory = choose(about["rows"], dim) if options.factory == "auto" else options.factory
    empty = new_index(factory, dim, options)
    lists = _lists(empty)
    if lists is None:
        import faiss

        empty = faiss.IndexIDMap2(empty)
    if not empty.is_trained:
        wanted = TRAINING_VECTORS * lists.nlist if lists is not None else FLAT_TRAINING
        try:
            empty.train(sample(parts, wanted, seed))
        except RuntimeError as error:
            raise SurfError(
                f"FAISS cannot train it on {about['rows']} vectors ({str(error).rpartition('failed: ')[2]})",
                where=f"build_index.factory = {factory!r}",
                expected="fewer lists than vectors: auto chooses them",
            ) from None
    on_disk = lists is not None and about["rows"] * (lists.code_size + 8) > DISK_BYTES
    index = _on_disk(empty, parts, out, f"{factory} {seed} {about}") if on_disk else _add(empty, parts)
    if index.ntotal == 0:
        raise SurfError("not one image could be embedded", where=str(manifest), next="see results/quarantine/embeddings")
    return index, {
        "ntotal": index.ntotal,
        "dim": dim,
        "metric": "inner_product",
        "factory": factory,
        "probes": None if lists is None else min(options.probes, lists.nlist),
        "recall_at_10": 1.0 if factory == "Flat" else recall(index, parts, seed),
        "embeddings": about["parts"],
    }


def choose(rows: int, dim: int) -> str:
    """FAISS factory string for `rows` vectors of `dim` numbers: exact as long as memory allows, see `build_index.factory`."""
    if rows * dim * 4 <= FLAT_BYTES:
        return "Flat"
    lists = 2 ** round(math.log2(4 * math.sqrt(rows)))  # FAISS's guidelines: 4 to 16 times the root
    if rows * dim <= SQ8_BYTES:
        return f"IVF{lists},SQ8"
    return f"IVF{lists},PQ{max(size for size in range(1, dim // 8 + 1) if dim % size == 0)}"


def recall(index: Any, parts: list[Path], seed: int, k: int = 10) -> float:
    """Share of the exact k nearest neighbours that the index finds, over a sample of its own vectors (themselves left out)."""
    queries = sample(parts, RECALL_QUERIES, seed)
    device = "cuda" if search.gpu() else "cpu"
    true = search.exact((block for part in parts for block in blocks(part)), queries, k + 1, device)[1][:, 1:]
    found = index.search(queries, k + 1)[1]
    right = [len(np.intersect1d(a[a >= 0], b)) / max(1, (a >= 0).sum()) for a, b in zip(true, found, strict=True)]
    share = round(float(np.mean(right)), 4)
    log.info("recall@%d against exact search: %.4f, over %d queries", k, share, len(queries))
    return share


def blocks(part: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The vectors of one part in pieces of equal size, see `search.exact`."""
    ids, vectors = read_vectors(part)
    for start in range(0, len(ids), search.BLOCK_ROWS):
        yield ids[start : start + search.BLOCK_ROWS], vectors[start : start + search.BLOCK_ROWS]


def read_vectors(part: Path) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64 [n], vectors float32 [n, dim]) of the readable images of one part of `embeddings`."""
    table = store.read_table(part, "embeddings")
    if table["embedding"].null_count:
        table = table.filter(table["embedding"].is_valid())
    return table["image_id"].to_numpy(), to_matrix(table["embedding"])


def to_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """float32 [n, dim] from a column of fixed-size float16 lists without nulls."""
    array = column.combine_chunks()
    values = array.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return values.reshape(len(array), array.type.list_size)


def sample(parts: list[Path], count: int, seed: int) -> np.ndarray:
    """About `count` vectors, the same share of each part; float32 [n, dim]."""
    per_part = -(-count // len(parts))
    rng = np.random.default_rng(seed)
    chosen = []
    for part in parts:
        vectors = read_vectors(part)[1]
        chosen.append(vectors[np.sort(rng.permutation(len(vectors))[:per_part])])
    return np.concatenate(chosen)


def new_index(factory: str, dim: int, options: config.BuildIndex) -> Any:
    """An empty index that looks at `build_index.probes` lists.

    Raises:
        SurfError: FAISS does not know the factory string.
    """
    import faiss

    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        message = str(error).splitlines()[-1]
        raise SurfError(
            f"FAISS refuses it ({message})",
            where=f"build_index.factory = {options.factory!r}",
            expected="auto, Flat, or e.g. IVF1024,SQ8",
        ) from None
    if (lists := _lists(index)) is not None:
        lists.nprobe = min(options.probes, lists.nlist)
    return index


def _lists(index: Any) -> Any:
    """The index's inverted lists, or None."""
    import faiss

    return faiss.try_extract_index_ivf(index)


def _add(index: Any, parts: Sequence[Path]) -> Any:
    with ThreadPoolExecutor(1) as thread:  # reads the next part while this one is added
        following = thread.submit(read_vectors, parts[0])
        for (number,) in cli.chunks(range(len(parts)), 1, desc="build_index", unit="part"):
            ids, vectors = following.result()
            if number + 1 < len(parts):
                following = thread.submit(read_vectors, parts[number + 1])
            if len(ids):
                index.add_with_ids(vectors, ids)
    return index


def _on_disk(trained: Any, parts: Sequence[Path], out: Path, depends_on: str) -> Any:
    """One index for each part, then all of them merged into one file of inverted lists."""
    import faiss
    from faiss.contrib.ondisk import merge_ondisk

    folder = out.parent / "_partial" / hashlib.sha256(depends_on.encode()).hexdigest()[:16]
    files = [folder / f"{part.stem}.faiss" for part in parts]
    for ((part, file),) in cli.chunks(list(zip(parts, files, strict=True)), 1, desc="build_index", unit="part"):
        if not file.exists():
            write(_add(faiss.clone_index(trained), [part]), file)
    data = out.with_suffix(".ivfdata")
    with store.replacing(data) as temporary:
        merge_ondisk(trained, [str(file) for file in files], str(temporary))
        lists: Any = faiss.downcast_InvertedLists(_lists(trained).invlists)
        lists.filename = str(data)  # readers look for this name beside the index, see search.load
    return trained


def write(index: Any, path: Path) -> None:
    """Write an index, atomically."""
    import faiss

    with store.replacing(path) as temporary:
        faiss.write_index(index, str(temporary))


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
    clock = Clock()
    index, about = build_index(args.embeddings, args.build_index, args.seed, args.out)
    write(index, args.out)
    store.write_json(args.out.with_suffix(".json"), about)
    shutil.rmtree(args.out.parent / "_partial", ignore_errors=True)
    clock.note(args.out, about["ntotal"])
    log.info("%s: %d vectors of %d numbers", about["factory"], about["ntotal"], about["dim"])


if __name__ == "__main__":
    cli.run(main)
