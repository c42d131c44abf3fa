"""Write a world in which it is known which retrieved references help and which mislead, in shares of your choice.

    python -m surf.demo.controlled --out world --misleading 0.2 0.5 0.8 [--seed 0] [--workers 16] …

A query image hides three of its eight objects; the others are in plain sight. What the corpus holds for it depends on its case:

    case      what is listed                       tells  what a reader can know
    helps     2 re-renders of the scene            0      agree with all that is in plain sight: believe them
              2 look-alikes                        2      disagree twice
    misleads  3 look-alikes; or 2 re-renders with  1      disagree in one thing in plain sight, and are wrong about
              the captions of look-alikes and 1           all that is hidden
              look-alike (`--miscaptioned`)
              1 glimpse: two things in plain       0      true, but less like the query: it comes behind the others
              sight are left out

All else is unrelated scenes. Nothing is rigged for one method: hidden things can be partly seen through fog or beside a cover,
the tell can be seen by all, and whoever believes every reference is right about the queries that are helped. The images are
drawn once. A corpus file for each share lists some of them, so that the shares differ in nothing but the references: a query
misleads if its `level` is below the share. Equal seeds give equal bytes with any number of workers.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from surf.demo import questions as q
from surf.demo.draw import STYLES, Scene, Style, render
from surf.demo.world import CLEAR_NOISE, QUERY_NOISE, Picture, conversation, jpeg, pope_files, write_packed

FEWEST = 3  # objects of a scene: POPE asks about three
LISTED = 4  # references of one query in the corpus, in either case
ROWS_PER_GROUP = 64  # of images.parquet: one group is read and kept as a whole
GOOD = ("re-render", "glimpse")


@dataclass(frozen=True)
class Listing:
    """A row of the corpus file if the query has this case (or "always"), by what is said of the image."""

    case: str
    role: str
    caption: str


@dataclass(frozen=True)
class Drawn:
    """An image as JPEG with its listings; a query image has none."""

    scene: Scene
    data: bytes
    listings: tuple[Listing, ...] = ()
    hidden: tuple[str, ...] = ()  # kinds that a query image hides


@dataclass(frozen=True)
class Options:
    """Sizes of the world; every field is a flag."""

    size: str = "large"  # key of STYLES
    seed: int = 0
    images: int = 10_000  # with about five questions each, to tune on
    test_images: int = 600  # with six questions each in every POPE split
    corpus: int = 100_000  # listed image-caption pairs
    miscaptioned: float = 0.25  # of the misleading queries: the image is right, the caption is not
    murk: int = 255  # least opacity of fog, of 255: how little can be seen of what is hidden
    workers: int = 1

    @property
    def style(self) -> Style:
        return replace(STYLES[self.size], fog=(self.murk, 255))


def build(out: Path, shares: Sequence[float], options: Options) -> dict[str, int]:
    """Write images.parquet, sft.json, pope/, truth.parquet and corpus-SHARE.json below `out`; return row counts.

    Raises:
        ValueError: the corpus is too small for the references of all queries.
    """
    unrelated = options.corpus - LISTED * (options.images + options.test_images)
    if unrelated < 0:
        raise ValueError(f"a corpus of {options.corpus} cannot hold {LISTED} references for every query image")
    queries = [("sft", n) for n in range(options.images)] + [("pope", n) for n in range(options.test_images)]
    groups = list(draw_all(options, [*queries, *(("unrelated", n) for n in range(unrelated))]))
    rng = random.Random(f"controlled:{options.seed}")
    total = sum(map(len, groups))
    names = iter(rng.sample(range(1, 20 * total), total))
    levels = [*spread(options.images, rng), *spread(options.test_images, rng)]
    asked, listed, truth, pictures = [], [], [], []
    for number, group in enumerate(groups):
        query = number < len(queries)
        split = queries[number][0] if query else "corpus"
        level = levels[number] if query else 0.0
        if query:
            asked.append(Picture(f"{split}/{next(names):012d}.jpg", group[0].scene, group[0].data))
            pictures.append((asked[-1].name, asked[-1].data))
        for one in group[query:]:
            name = f"corpus/{next(names):012d}.jpg"
            listed.append((name, one, level))
            pictures.append((name, one.data))  # a query's references lie beside it, and are read together
            rows = [(name, listing) for listing in one.listings if query]
            about = (asked[-1].name, split, level, list(group[0].hidden)) if query else ()
            truth += [(*about, row.case, name, row.role, row.role in GOOD) for name, row in rows]
    rng.shuffle(listed)
    out.mkdir(parents=True, exist_ok=True)
    write_packed(out / "images.parquet", pictures, ROWS_PER_GROUP)
    write_truth(out / "truth.parquet", truth)
    counts = {"images": len(pictures)}
    for share in shares:
        pairs = list(corpus_rows(listed, share))
        write_json(out / f"corpus-{share:g}.json", pairs)
        counts[f"corpus {share:g}"] = len(pairs)
    sft = [one for one in asked if one.name.startswith("sft/")]
    write_json(out / "sft.json", [conversation(one.name, one.scene, rng, suffix_once=False) for one in sft])
    files = pope_files(asked[len(sft) :], asked, rng)
    for split, lines in files.items():
        path = out / "pope" / f"coco_pope_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        counts[f"pope {split}"] = len(lines)
    return counts


def spread(count: int, rng: random.Random) -> list[float]:
    """Return levels evenly spread over (0, 1) in random order: of any share, exactly that many queries mislead."""
    return [(place + 0.5) / count for place in rng.sample(range(count), count)]


def draw_all(options: Options, wanted: list[tuple[str, int]]) -> Iterator[list[Drawn]]:
    """Yield the images of every query, first its own one, and every unrelated image, by `options.workers` processes."""
    from multiprocessing import get_context

    task = partial(draw, options)
    if options.workers <= 1:
        yield from map(task, wanted)
        return
    with get_context("spawn").Pool(options.workers) as pool:
        yield from pool.imap(task, wanted, chunksize=64)


def draw(options: Options, wanted: tuple[str, int]) -> list[Drawn]:
    """Draw one query image with its references, or one unrelated image; a random stream of its own makes it."""
    split, number = wanted
    rng = random.Random(f"controlled:{options.seed}:{split}:{number}")
    style = options.style
    scene = q.sample_scene(rng, FEWEST, style)

    def clear(shown: Scene, *listings: Listing) -> Drawn:
        return Drawn(shown, jpeg(render(shown, rng, CLEAR_NOISE, style=style)), listings)

    def true(shown: Scene, case: str, role: str) -> Drawn:
        return clear(shown, Listing(case, role, q.caption(shown, rng)))

    if split == "unrelated":
        return [true(scene, "always", "unrelated")]
    hidden = q.hide_some(scene, rng, style)
    drawn = [Drawn(scene, jpeg(render(scene, rng, QUERY_NOISE, hidden, style)), hidden=tuple(hidden))]
    lies = 2 if rng.random() < options.miscaptioned else 0
    for number in range(2):
        listings = [Listing("helps", "re-render", q.caption(scene, rng))]
        if number < lies:
            listings.append(Listing("misleads", "miscaptioned", q.caption(q.mislead(scene, rng, hidden, 1, style), rng)))
        drawn.append(clear(scene, *listings))
    drawn += [true(q.mislead(scene, rng, hidden, 2, style), "helps", "look-alike") for _ in range(2)]
    drawn += [true(q.mislead(scene, rng, hidden, 1, style), "misleads", "look-alike") for _ in range(3 - lies)]
    return [*drawn, true(q.glimpse(scene, rng, hidden), "misleads", "glimpse")]


def corpus_rows(listed: list[tuple[str, Drawn, float]], share: float) -> Iterator[dict[str, Any]]:
    """Yield the image-caption pairs that are there when this share of the queries misleads."""
    for name, one, level in listed:
        case = "misleads" if level < share else "helps"
        for listing in one.listings:
            if listing.case in (case, "always"):
                yield {"image": name, "caption": listing.caption}


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def write_truth(path: Path, rows: list[tuple[Any, ...]]) -> None:
    """Write a row for every query, case and reference.

    Columns: query (string, image name), split (sft or pope), level (float64, in (0, 1): the query misleads where the share is
    above it), hidden (list of string, kinds), case (helps or misleads), image (string, the reference), role (string), good
    (bool: it shows what is hidden).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    query = {"query": pa.string(), "split": pa.string(), "level": pa.float64(), "hidden": pa.list_(pa.string())}
    schema = pa.schema({**query, "case": pa.string(), "image": pa.string(), "role": pa.string(), "good": pa.bool_()})
    columns: list[Sequence[Any]] = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in schema]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--misleading", type=float, nargs="+", default=[0.5], help="shares of the queries, a corpus for each")
    for name, default in vars(Options()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = vars(parser.parse_args())
    out, shares = args.pop("out"), args.pop("misleading")
    for name, rows in build(out, shares, Options(**args)).items():
        print(f"{name}: {rows} rows")


if __name__ == "__main__":
    main()
