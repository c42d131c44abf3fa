"""Read the corpus: image-caption pairs out of ShareGPT4V-style JSON, numbered, into `catalog`.

python -m surf.catalog --out results/catalog --quarantine results/quarantine/catalog.parquet --shards 4 FLAGS
"""

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa

from surf import cli, config, merge, prompts, quarantine, store
from surf.errors import SurfError, first_of
from surf.schemas import SCHEMAS
from surf.shards import part_names, row_range

log = logging.getLogger("surf")


def catalog(options: config.Catalog) -> tuple[pa.Table, dict[str, str]]:
    """The whole corpus as one table, and the rows that could not be used.

    `image_id` is the row number over the rows that could be used. Rows look like {"image", "caption"} or, as ShareGPT4V's own
    files, {"image", "conversations": [{"from": "human", …}, {"from": "gpt", "value": CAPTION}]}.

    Returns:
        (table with the columns of `catalog`, {"FILE[ROW]": error})

    Raises:
        SurfError: a file is missing, no JSON, no list, or holds no pair at all.
    """
    images: list[str] = []
    captions: list[str] = []
    errors: dict[str, str] = {}
    cuts = 0
    for name in options.captions:
        for number, row in enumerate(store.read_rows(Path(name), "a list of image-caption pairs (catalog.captions)")):
            try:
                image, caption = _pair(row)
            except ValueError as error:
                errors[f"{name}[{number}]"] = str(error)
                continue
            short = prompts.cut(caption, options.max_caption_chars)
            cuts += short != caption
            images.append(image)
            captions.append(short)
    if not images:
        raise SurfError(
            f"there is no image-caption pair ({first_of(errors)})",
            where=", ".join(options.captions),
            expected='rows {"image", "caption"} or {"image", "conversations": [{"from": "human"}, {"from": "gpt", "value"}]}',
            next="see docs/data.md, then mend the file or catalog.captions",
        )
    if cuts:
        log.warning("%d captions were longer than catalog.max_caption_chars and were cut", cuts)
    columns = [pa.array(range(len(images)), pa.int64()), pa.array(images, pa.string()), pa.array(captions, pa.string())]
    return pa.table(columns, schema=SCHEMAS["catalog"]), errors


def _pair(row: Any) -> tuple[str, str]:
    if not isinstance(row, dict):
        raise ValueError(f"is {type(row).__name__}, not an object")
    image, caption = row.get("image"), row.get("caption")
    if caption is None:
        turns = row.get("conversations")
        turns = turns if isinstance(turns, list) else []
        caption = next((turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") == "gpt"), None)
    for key, value in (("image", image), ("caption", caption)):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"has no {key}")
    return str(image), str(caption).strip()


def main() -> None:
    """Command line."""
    args = cli.parse(
        None,
        prog="catalog",
        about=__doc__ or "",
        sections=["catalog", "images"],
        paths=["out", "quarantine"],
        extras={"shards": {"type": int, "required": True}},
    )
    table, errors = catalog(args.catalog)
    total = table.num_rows + len(errors)
    quarantine.settle(
        args.quarantine, errors, dataset="catalog", stage="catalog", total=total, max_bad_share=args.images.max_bad_share
    )
    parts = []
    for index, name in enumerate(part_names(args.shards)):
        rows = row_range(table.num_rows, index, args.shards)
        parts.append(args.out / f"{name}.parquet")
        meta = {"stage": "catalog", "version": args.catalog.version, "flags": cli.flags(catalog=args.catalog)}
        store.write_table(parts[-1], table.slice(rows.start, len(rows)), "catalog", meta)
    merge.merge("catalog", parts, args.out / store.MANIFEST)
    log.info("%d image-caption pairs in %d shards", table.num_rows, args.shards)


if __name__ == "__main__":
    cli.run(main)
