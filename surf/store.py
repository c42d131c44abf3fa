"""Reading and writing Parquet datasets: schema-checked, atomic, resumable.

A file appears under its name only when it is whole: it is written beside it, synced, then renamed. Readers go through
`_manifest.json`, never through a folder listing, so a stray file is never read.
"""

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from surf import __version__
from surf.errors import SurfError
from surf.files import read_json as read_json  # all reading and writing is asked for as `store`
from surf.files import read_rows as read_rows
from surf.files import replacing as replacing
from surf.files import write_json as write_json
from surf.files import write_json_rows as write_json_rows
from surf.files import write_text as write_text
from surf.files import writer_is_gone
from surf.schemas import KEYS, SCHEMAS, with_dim

MANIFEST = "_manifest.json"
# What makes a file anew. No target: only the user knows the cores, the profile and the config that go with it.
AGAIN = "your snakemake command again"
# Numbers of embeddings hardly repeat: dictionaries of them make reading ten times slower, and no file smaller. Their statistics
# take a third of the time of writing. Bytes of equal weight side by side are written faster, and are somewhat smaller.
ENCODINGS: dict[str, dict[str, Any]] = {
    "embeddings": {
        "use_dictionary": False,
        "write_statistics": ["image_id"],
        "column_encoding": {"embedding.list.element": "BYTE_STREAM_SPLIT"},
    }
}
log = logging.getLogger("surf")


# --- tables -----------------------------------------------------------------------------------------------------------


def write_table(path: Path, table: pa.Table, dataset: str, meta: Mapping[str, Any] | None = None) -> None:
    """Write `table` as one Parquet file (zstd) of `dataset`.

    Args:
        meta: kept as key-value metadata beside the dataset's name, the row count, the content's digest and surf's version.

    Raises:
        SurfError: the columns are not those of the dataset, or a key stands twice.
    """
    table = table.select(_names(dataset)).cast(_schema(dataset, table.schema)).combine_chunks()
    check_unique(table, dataset, str(path))
    metadata = {
        "surf.dataset": dataset,
        "surf.digest": digest(table),
        "surf.package": __version__,
        **{f"surf.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in (meta or {}).items()},
    }
    with replacing(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd", **ENCODINGS.get(dataset, {}))


def read_table(path: Path, dataset: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one Parquet file of `dataset`, or the whole dataset if `path` is its `_manifest.json`.

    Raises:
        SurfError: the file is missing, torn, or of another dataset; a part differs from the manifest.
    """
    if path.name == MANIFEST:
        tables = [_read_part(part, dataset, columns) for part in parts_of(path, dataset)]
        return pa.concat_tables(tables).combine_chunks()
    return _read_part(path, dataset, columns)


def rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows as plain dictionaries."""
    return list(table.to_pylist())


def table_of(rows: Iterable[Mapping[str, Any]], dataset: str) -> pa.Table:
    """A table with the columns of `dataset` from dictionaries; a missing key becomes null."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMAS[dataset])


def digest(table: pa.Table) -> str:
    """SHA-256 of a table's content; independent of compression, row groups and metadata (16 hex digits)."""
    sink = hashlib.sha256()
    sink.update(str(table.schema.remove_metadata()).encode())
    batch = table.replace_schema_metadata(None).combine_chunks()
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, batch.schema) as writer:
        writer.write_table(batch)
    sink.update(buffer.getvalue())
    return sink.hexdigest()[:16]


def check_unique(table: pa.Table, dataset: str, where: str) -> None:
    """Raise SurfError if a key of `dataset` stands twice in `table`, and name it."""
    keys = KEYS[dataset]
    if table.num_rows == 0:
        return
    counts = table.select(keys).group_by(keys).aggregate([([], "count_all")])
    if counts.num_rows != table.num_rows:
        twice = next(row for row in counts.to_pylist() if row["count_all"] > 1)
        name = ", ".join(f"{key} = {twice[key]!r}" for key in keys)
        raise SurfError(f"{name} stands {twice['count_all']} times", where=where, expected="each key once")


def footer(path: Path) -> tuple[pq.FileMetaData, dict[str, str]]:
    """Parquet metadata and surf's own key-value metadata of one file.

    Raises:
        SurfError: the file is missing or torn; says how to make it anew.
    """
    try:
        metadata = pq.read_metadata(path)
    except FileNotFoundError:
        raise SurfError("there is no such file", where=str(path), next=_anew(path)) from None
    except (OSError, pa.ArrowException) as error:
        raise SurfError(f"is no whole Parquet file ({_first_line(error)})", where=str(path), next=_anew(path)) from None
    pairs = {k.decode(): v.decode() for k, v in (metadata.metadata or {}).items()}
    return metadata, {k.removeprefix("surf."): v for k, v in pairs.items() if k.startswith("surf.")}


def parts_of(manifest: Path, dataset: str | None = None) -> list[Path]:
    """Paths of a dataset's parts, in order, checked against the manifest's sizes.

    Raises:
        SurfError: no manifest, another dataset, or a part that is missing or differs.
    """
    again = _anew(manifest)
    content = read_json(manifest, expected="a manifest written by `merge`", next=again)
    if not isinstance(content, dict) or not content.keys() >= {"dataset", "parts"}:
        raise SurfError("is no manifest", where=str(manifest), expected="a manifest written by `merge`", next=again)
    if dataset is not None and content["dataset"] != dataset:
        raise SurfError(f"lists dataset {content['dataset']!r}", where=str(manifest), expected=f"dataset {dataset!r}")
    paths = []
    for part in content["parts"]:
        path = manifest.parent / part["file"]
        meta = footer(path)[1]
        if meta.get("digest") != part["digest"]:
            raise SurfError("differs from the manifest", where=str(path), next=_anew(manifest))
        paths.append(path)
    return paths


def files_of(paths: Iterable[Path], dataset: str) -> list[Path]:
    """The files themselves, and those that manifests among `paths` list."""
    return [file for path in paths for file in (parts_of(path, dataset) if path.name == MANIFEST else [path])]


def _read_part(path: Path, dataset: str, columns: Sequence[str] | None) -> pa.Table:
    meta = footer(path)[1]
    if meta.get("dataset") != dataset:
        found = meta.get("dataset", "a file that surf did not write")
        raise SurfError(f"is {found}", where=str(path), expected=f"a part of dataset {dataset!r}")
    try:
        table = pq.read_table(path, columns=list(columns) if columns else None, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise SurfError(f"cannot be read ({_first_line(error)})", where=str(path), next=_anew(path)) from None
    expected = _schema(dataset, table.schema)
    if columns:
        expected = pa.schema([expected.field(name) for name in columns])
    if not table.schema.remove_metadata().equals(expected):
        raise SurfError(
            f"has columns {_describe(table.schema)}", where=str(path), expected=f"the columns {_describe(expected)}"
        )
    return table.replace_schema_metadata(None)


def _schema(dataset: str, found: pa.Schema) -> pa.Schema:
    if dataset == "embeddings" and "embedding" in found.names:
        kind = found.field("embedding").type
        if pa.types.is_fixed_size_list(kind):
            return with_dim(kind.list_size)
    return SCHEMAS[dataset]


def _names(dataset: str) -> list[str]:
    return list(SCHEMAS[dataset].names)


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _anew(path: Path) -> str:
    """What to type so that `path` is made anew; with its manifest, beside which Snakemake would not miss a part."""
    files = " ".join(str(file) for file in dict.fromkeys([path, path.with_name(MANIFEST)]) if file.exists())
    return f"rm {files}, then {AGAIN}" if files else AGAIN


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


# --- unfinished work --------------------------------------------------------------------------------------------------


class Partial:
    """Finished rows of an unfinished part, kept so that a killed job goes on where it stopped.

    Rows are saved as small Parquet files in `_partial/<part>/<key>/` beside the part. `key` digests everything that the rows
    depend on (flags, version, inputs), so rows made under other settings are never picked up. Files are only ever added,
    under unique names: two writers do the same work twice at worst.
    """

    def __init__(self, out: Path, dataset: str, **depends_on: Any) -> None:
        text = json.dumps(depends_on, sort_keys=True, default=str)
        self.out, self.dataset = out, dataset
        self.folder = out.parent / "_partial" / out.stem / hashlib.sha256(text.encode()).hexdigest()[:16]

    def read(self, *, earlier: bool = True) -> pa.Table:
        """All saved rows, each key once. A torn file (a disk that lied) is left out: its rows are made anew.

        Args:
            earlier: the rows are those of an earlier run, which is worth a line in the log.
        """
        tables = []
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                tables.append(_read_part(path, self.dataset, None))
            except SurfError:
                path.unlink(missing_ok=True)
        if not tables:
            return SCHEMAS[self.dataset].empty_table()
        table = pa.concat_tables(tables).combine_chunks()
        number = pa.array(range(table.num_rows), pa.int64())
        keys = KEYS[self.dataset]
        first = table.select(keys).append_column("#", number).group_by(keys).aggregate([("#", "min")])
        if earlier:
            log.info("%d rows are saved already, and are not made again", first.num_rows)
        return table.take(first.column("#_min").sort())

    def save(self, table: pa.Table) -> None:
        """Add finished rows."""
        if not table.num_rows:
            return
        for attempt in range(10):
            try:
                return write_table(self.folder / f"{uuid.uuid4().hex}.parquet", table, self.dataset)
            except FileNotFoundError:  # the part is finished by a second writer, and was forgotten this very moment
                if attempt == 9:
                    raise


def forgotten(part: Path) -> SurfError:
    """What to say when rows that were saved are gone before the part could be written."""
    return SurfError(
        "its saved rows are gone: another job finished it meanwhile",
        where=str(part),
        expected="one job for it at a time",
        next="the same command again; what is finished is kept",
    )


def forget(part: Path) -> None:
    """Forget the saved rows of a finished part.

    Not when its job ends but later, when its dataset is whole: Snakemake makes a part again if Snakemake was killed while the
    job was at work, however the job ended, and then finds the rows here.
    """
    root = part.parent / "_partial"
    shutil.rmtree(root / part.stem, ignore_errors=True)
    with suppress(OSError):  # other parts still have unfinished rows
        root.rmdir()


def sweep(folder: Path) -> int:
    """Remove what is not needed below `folder` when no job is at work; the number of files that killed writers left.

    These are temporary files, but for those of processes that are alive on this machine. Saved rows of finished parts go too,
    but not beside a part that says what it `depends` on: it may be older than they are, and its job forgets them itself.
    """
    strays = [path for path in folder.rglob(".*.tmp") if writer_is_gone(path, elsewhere=True)]
    for path in strays:
        path.unlink(missing_ok=True)
    for path in list(folder.rglob("_partial/*")):
        part = path.parent.parent / f"{path.name}.parquet"
        with suppress(SurfError):  # no part that can be read: no reason to forget
            if part.exists() and "depends" not in footer(part)[1]:
                forget(part)
    return len(strays)
