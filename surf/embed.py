"""Embed the images of one catalog part with CLIP.

python -m surf.embed --catalog results/catalog/part-….parquet --out results/embeddings/part-….parquet --quarantine … FLAGS
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from surf import cli, quarantine, store
from surf.images import Images
from surf.models import Encoder
from surf.schemas import with_dim
from surf.telemetry import Clock

FLUSH = 4096  # images between two saves of unfinished work


def embed(catalog: pa.Table, encoder: Encoder, partial: store.Partial) -> tuple[pa.Table, dict[str, str]]:
    """Embeddings of every row of `catalog`, in its order, and the images that could not be read.

    Returns:
        (table with image_id and embedding: fixed_size_list<float16>[dim], null where unreadable; {image: error})
    """
    names = dict(zip(catalog["image_id"].to_pylist(), catalog["image"].to_pylist(), strict=True))
    done = partial.read()
    finished = set(done["image_id"].to_pylist())
    tables = [done] if done.num_rows else []
    todo = [image_id for image_id in names if image_id not in finished]
    errors: dict[str, str] = {}
    for ids in cli.chunks(todo, FLUSH, desc="embed", unit="image"):
        vectors, bad = encoder.encode([names[image_id] for image_id in ids])
        errors.update(bad)
        readable = [image_id for image_id in ids if names[image_id] not in bad]
        rows = [number for number, image_id in enumerate(ids) if names[image_id] not in bad]
        tables.append(_table(readable, vectors[rows]))
        partial.save(tables[-1])
    found = pa.concat_tables(tables) if tables else _table([], np.zeros((0, encoder.dim), np.float32))
    place = {image_id: row for row, image_id in enumerate(found["image_id"].to_pylist())}
    rows = pa.array([place.get(image_id) for image_id in names], pa.int64())
    columns = [catalog["image_id"], found["embedding"].combine_chunks().take(rows)]
    return pa.table(columns, schema=with_dim(encoder.dim)), errors


def _table(ids: Sequence[int], vectors: np.ndarray) -> pa.Table:
    """vectors: float32 [len(ids), dim]."""
    if not np.isfinite(vectors).all():
        raise FloatingPointError("the encoder gave NaN or infinity: check its weights, or use embed.precision fp32")
    dim = vectors.shape[1]
    flat = pa.array(vectors.astype(np.float16).reshape(-1), pa.float16())
    return pa.table([pa.array(ids, pa.int64()), pa.FixedSizeListArray.from_arrays(flat, dim)], schema=with_dim(dim))


def main() -> None:
    """Command line."""
    args = cli.parse(
        None, prog="embed", about=__doc__ or "", sections=["embed", "images"], paths=["catalog", "out", "quarantine"]
    )
    from surf.models import clip

    clock = Clock()
    table = store.read_table(args.catalog, "catalog", ["image_id", "image"])
    encoder = clip.load(args.embed, Images(args.images.roots, args.images.max_pixels))
    clock.loaded()
    flags = cli.flags(embed=args.embed)
    partial = store.Partial(args.out, "embeddings", flags=flags, version=args.embed.version, input=store.digest(table))
    result, errors = embed(table, encoder, partial)
    quarantine.settle(
        args.quarantine,
        errors,
        dataset="embeddings",
        stage="embed",
        total=table.num_rows,
        max_bad_share=args.images.max_bad_share,
    )
    meta = {"stage": "embed", "version": args.embed.version, "flags": flags}
    store.write_table(args.out, result, "embeddings", meta)
    clock.note(args.out, table.num_rows)


if __name__ == "__main__":
    cli.run(main)
