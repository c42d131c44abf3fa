"""Images that lie inside a public file, as an image root: a Parquet file of names and bytes.

    python -m surf.tasks.unpack --file mmstar.parquet --out mmstar-images.parquet

Then add the file to images.roots. Reads hub Parquet files, VLMEvalKit's TSV and CIFAR-10's `.bin`. An image that stands in
several rows is kept once.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from surf import cli, store
from surf.errors import SurfError
from surf.tasks import packed

log = logging.getLogger("surf")
_ROW_GROUP = 256  # images read at a time by `surf.images`


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = cli.parse(
        argv, prog="tasks.unpack", about="Write the images inside a public file as an image root.", paths=["file", "out"]
    )
    log.info("%d images", unpack(args.file, args.out))


def unpack(path: Path, out: Path) -> int:
    """Write `out`: columns image (string, as the readers name it) and bytes (binary, an image file).

    Returns:
        the number of images.

    Raises:
        SurfError: `path` is no such file, or a row has no image.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("image", pa.string()), ("bytes", pa.binary())])
    kept = {"image": "zstd", "bytes": "none"}  # image files are compressed already
    written: set[str] = set()
    with (
        store.replacing(out) as temporary,
        pq.ParquetWriter(temporary, schema, compression=kept, use_dictionary=False) as writer,
    ):
        for group in _groups(path, written):
            writer.write_table(pa.table({"image": list(group), "bytes": list(group.values())}, schema=schema))
    return len(written)


def _groups(path: Path, written: set[str]) -> Iterator[dict[str, bytes]]:
    group: dict[str, bytes] = {}
    for name, data in _images(path):
        if name not in written:
            written.add(name)
            group[name] = data
        if len(group) == _ROW_GROUP:
            yield group
            group = {}
    if group:
        yield group


def _images(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.suffix == ".bin":
        for _, _, pixels in packed.cifar10(path, "test"):
            yield packed.name(pixels), packed.png(pixels)
    elif path.suffix in (".parquet", ".tsv"):
        for _, _, data in packed.rows(path):
            yield packed.name(data), data
    else:
        raise SurfError("holds no images that can be unpacked", where=str(path), expected="a .parquet, .tsv or .bin file")


if __name__ == "__main__":
    cli.run(main)
