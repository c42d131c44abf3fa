"""Check that a dataset is whole and write its `_manifest.json`.

python -m surf.merge --dataset answers --out results/answers/_manifest.json --parts results/answers/part-*.parquet
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from surf import cli, store
from surf.errors import SurfError
from surf.schemas import KEYS


def merge(dataset: str, parts: Sequence[Path], out: Path) -> None:
    """Write the manifest of `parts`: {dataset, version, schema, rows, parts: [{file, rows, bytes, digest}]}.

    It holds no time stamps, so equal content gives equal bytes and nothing downstream reruns.

    Raises:
        SurfError: a part is torn or of another dataset or version; a stray part lies beside them; a key stands twice.
    """
    listed = sorted(parts)
    known = {path.resolve() for path in listed}
    strays = sorted(path for path in out.parent.glob("*.parquet") if path.resolve() not in known)
    if strays:
        names = " ".join(str(path) for path in strays)
        raise SurfError(f"{len(strays)} parts are not part of this run", where=str(out.parent), next=f"rm {names}")
    entries, keys, versions, schemas = [], [], {}, {}
    for path in listed:
        metadata, meta = store.footer(path)
        table = store.read_table(path, dataset, KEYS[dataset])
        keys.append(table)
        versions[meta.get("version", "")] = path
        schemas[str(metadata.schema.to_arrow_schema().remove_metadata())] = path
        content = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        entries.append({"file": path.name, "rows": metadata.num_rows, "bytes": content, "digest": meta["digest"]})
    for what, found in (("stage versions", versions), ("schemas", schemas)):
        if len(found) > 1:
            older = " ".join(str(path) for path in list(found.values())[:-1])
            again = f"rm {older}, then {store.AGAIN}"
            raise SurfError(f"the parts have {len(found)} {what}", where=str(out.parent), next=again)
    store.check_unique(pa.concat_tables(keys).combine_chunks(), dataset, str(out.parent))
    manifest = {
        "dataset": dataset,
        "version": next(iter(versions)),
        "schema": [f"{field.name}: {field.type}" for field in pq.read_schema(listed[0])],
        "rows": sum(entry["rows"] for entry in entries),
        "parts": entries,
    }
    store.write_json(out, manifest)
    for path in listed:
        store.forget(path)


def main() -> None:
    """Command line."""
    args = cli.parse(
        None,
        prog="merge",
        about=__doc__ or "",
        paths=["out"],
        extras={
            "dataset": {"required": True, "choices": sorted(KEYS)},
            "parts": {"required": True, "nargs": "+", "type": Path},
        },
    )
    merge(args.dataset, args.parts, args.out)


if __name__ == "__main__":
    cli.run(main)
