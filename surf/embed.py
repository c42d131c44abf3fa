"""Embed the images of one catalog part with CLIP.

python -m surf.embed --catalog results/catalog/part-….parquet --out results/embeddings/part-….parquet --quarantine … FLAGS
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from surf import cli, quarantine, store, workers
from surf.errors import SurfError
from surf.images import Images
from surf.models import Encoder
from surf.schemas import with_dim
from surf.telemetry import Clock, Meter

FLUSH = 4096  # images between two saves of unfinished work, unless they take longer than `cli.SLICE_SECONDS`
BLOCK = 1024  # images that follow one another stay with one worker: packed files are read in order


def embed(catalog: pa.Table, encoder: Encoder, partial: store.Partial) -> tuple[pa.Table, dict[str, str]]:
    """Embeddings of every row of `catalog`, in its order, and the images that could not be read.

    Returns:
        (table with image_id and embedding: fixed_size_list<float16>[dim], null where unreadable; {image: error})
    """
    errors = fill(catalog, encoder, partial)
    return collect(catalog, partial.read(earlier=False), errors, partial.out, encoder.dim), errors


def fill(catalog: pa.Table, encoder: Encoder, partial: store.Partial) -> dict[str, str]:
    """Embed the rows that `partial` lacks, and save them there; {image: error} of those that cannot be read."""
    done = partial.read()["image_id"].combine_chunks()
    todo = catalog.filter(pc.invert(pc.is_in(catalog["image_id"], value_set=done)))
    ids, names = todo["image_id"].to_numpy(), todo["image"].to_pylist()
    errors: dict[str, str] = {}
    fresh: list[pa.Table] = []
    saves: list[Future[None]] = []
    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        saved = time.monotonic()
        for one in saves:  # a full disk is noticed now, not when all images are done
            if one.done():
                one.result()
        saves.append(writer.submit(_save, encoder, partial, pa.concat_tables(fresh).combine_chunks()))
        fresh.clear()

    with ThreadPoolExecutor(1) as writer, cli.progress(len(names), desc="embed", unit="image") as bar:
        try:
            for numbers, vectors, bad in encoder.stream(names):
                good = [place for place, number in enumerate(numbers) if number not in bad]
                fresh.append(_table(ids[[numbers[place] for place in good]], vectors[good]))
                errors.update({names[number]: error for number, error in bad.items()})
                if sum(table.num_rows for table in fresh) >= FLUSH or time.monotonic() - saved > cli.SLICE_SECONDS:
                    save()
                bar.update(len(numbers))
        finally:  # also when a signal ends this
            if fresh:
                save()
    for one in saves:
        one.result()
    return errors


def collect(catalog: pa.Table, found: pa.Table, errors: Mapping[str, str], out: Path, dim: int | None = None) -> pa.Table:
    """The part `out`: the rows `found`, in the order of the catalog. Without `dim` they tell the dimension.

    Raises:
        SurfError: there is no row and no `dim`; an image has neither a row nor an error.
    """
    missing = catalog.filter(pc.invert(pc.is_in(catalog["image_id"], value_set=found["image_id"].combine_chunks())))
    if not errors.keys() >= set(missing["image"].to_pylist()):
        raise store.forgotten(out)
    if not found.num_rows:
        if dim is None:
            raise SurfError("not one image of this part could be read", where=str(out), next="check images.roots")
        found = _table([], np.zeros((0, dim), np.float32))
    place = pc.index_in(catalog["image_id"], value_set=found["image_id"].combine_chunks())
    columns = [catalog["image_id"], found["embedding"].combine_chunks().take(place)]
    return pa.table(columns, schema=found.schema)


def _save(encoder: Encoder, partial: store.Partial, table: pa.Table) -> None:
    with encoder.meter("write"):
        partial.save(table)


def _table(ids: Sequence[int] | np.ndarray, vectors: np.ndarray) -> pa.Table:
    """vectors: float32 [len(ids), dim]."""
    dim = vectors.shape[1]
    flat = pa.array(vectors.astype(np.float16).reshape(-1), pa.float16())
    return pa.table([pa.array(ids, pa.int64()), pa.FixedSizeListArray.from_arrays(flat, dim)], schema=with_dim(dim))


def main() -> None:
    """Command line."""
    args = cli.parse(
        None, prog="embed", about=__doc__ or "", sections=["embed", "images"], paths=["catalog", "out", "quarantine"]
    )
    clock, meter = Clock(), Meter()
    table = store.read_table(args.catalog, "catalog", ["image_id", "image"])
    flags = cli.flags(embed=args.embed)
    partial = store.Partial(args.out, "embeddings", flags=flags, version=args.embed.version, input=store.digest(table))
    dim = None
    if count := workers.wanted():
        (found,), errors = workers.lead(count, [partial], table.num_rows, desc="embed", unit="image")
    else:
        from surf.models import clip

        encoder = clip.load(args.embed, Images(args.images.roots, args.images.max_pixels))
        meter, dim = encoder.meter, encoder.dim
        clock.loaded()
        ids = pa.array(workers.mine(table["image_id"].to_pylist(), lambda image_id: str(image_id // BLOCK)), pa.int64())
        own = table.filter(pc.is_in(table["image_id"], value_set=ids))
        errors = fill(own, encoder, partial)
        if workers.report(errors, sum(name not in errors for name in own["image"].to_pylist())):
            return
        found = partial.read(earlier=False)
    result = collect(table, found, errors, args.out, dim)
    quarantine.settle(
        args.quarantine,
        errors,
        dataset="embeddings",
        stage="embed",
        total=table.num_rows,
        max_bad_share=args.images.max_bad_share,
    )
    meta = {"stage": "embed", "version": args.embed.version, "flags": flags}
    with meter("write"):
        store.write_table(args.out, result, "embeddings", meta)
    clock.note(args.out, table.num_rows, meter, workers=count)


if __name__ == "__main__":
    cli.run(main)
