"""The `pair` stage over many scored rows: time and peak memory, beside the plain in-memory way.

python benchmarks/pair.py [--rows 140000 1400000] [--target 14000000] [--rows-per-shard 70000]

Ours is the stage itself, from Parquet to Parquet; plain reads every shard into dictionaries, labels and chooses (the same
samples: checked). Each run is a process of its own. The rows are generated: five references a round, scores by match.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import common
import numpy as np
import plain
import pyarrow as pa

from surf import config, labels, merge, pair, store
from surf.shards import part_name

REFERENCES = 5
CORPUS = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs=2, default=[140_000, 1_400_000], help="scored rows of the two runs")
    parser.add_argument("--target", type=int, default=14_000_000, help="scored rows to extrapolate to")
    parser.add_argument("--rows-per-shard", type=int, default=70_000)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        chosen = plain_way(args.plain)
        print(json.dumps({"ids": [row["round_id"] for row in chosen], "peak": common.peak_mb()}))
        return
    results = []
    with TemporaryDirectory() as folder:
        for rows in args.rows:
            root = Path(folder) / str(rows)
            generate(root, rows, args.rows_per_shard)
            results.append((ours(root), plainly(root)))
    print(f"{common.machine()}\n")
    head = ["scored rows", "ours, s", "ours, peak MiB", "plain, s", "plain, peak MiB", "plain ÷ ours, s", "plain ÷ ours, MiB"]
    lines = [line(f"{rows:,}", found) for rows, found in zip(args.rows, results, strict=True)]
    slope = [
        [(b - a) / (args.rows[1] - args.rows[0]) for a, b in zip(*pairs, strict=True)] for pairs in zip(*results, strict=True)
    ]
    far = [
        [at + s * (args.target - args.rows[1]) for at, s in zip(*both, strict=True)]
        for both in zip(results[1], slope, strict=True)
    ]
    lines.append(line(f"{args.target:,} (on the line through both)", far))
    print(common.table(head, lines))


def line(name: str, found: list) -> list:
    (seconds, peak), (plain_seconds, plain_peak) = found
    return [name, seconds, peak, plain_seconds, plain_peak, plain_seconds / seconds, plain_peak / peak]


def manifests(root: Path) -> dict[str, Path]:
    return {name: root / name / "_manifest.json" for name in (*labels.DATASETS, "catalog")}


def ours(root: Path) -> tuple[float, float]:
    """Seconds and peak MiB of the stage."""
    at = manifests(root)
    words = ["--rounds", at["rounds"], "--scores-answers", at["scores/answers"], "--scores-reanswers", at["scores/reanswers"]]
    words += ["--neighbors", at["neighbors"], "--catalog", at["catalog"]]
    words += ["--out", root / "pairs.parquet", "--json", root / "pairs.json"]
    code = "import sys; sys.path.insert(0, 'benchmarks'); import common; from surf import pair; pair.main()"
    start = time.perf_counter()
    done = common.python("-c", f"{code}; print(common.peak_mb())", *map(str, words))
    return time.perf_counter() - start, float(done)


def plainly(root: Path) -> tuple[float, float]:
    """Seconds and peak MiB of the plain way."""
    start = time.perf_counter()
    done = json.loads(common.python(__file__, "--plain", str(root)))
    seconds = time.perf_counter() - start
    same = store.read_table(root / "pairs.parquet", "pairs", ["round_id"])["round_id"].to_pylist()
    if same != done["ids"]:
        raise AssertionError("the two ways chose different samples")
    return seconds, done["peak"]


def plain_way(root: Path) -> list[dict]:
    """The samples, from dictionaries of all rows."""
    rows = [store.rows(store.read_table(manifests(root)[name], name)) for name in labels.DATASETS]
    return pair.choose(list(plain.label(*rows, config.Score())), config.Pair(), 0)


def generate(root: Path, rows: int, per_shard: int) -> None:
    """Shards of the stage's inputs with `rows` scored re-answers."""
    count = -(-rows // per_shard)
    for shard in range(count):
        size = min(per_shard, rows - shard * per_shard) // REFERENCES
        rng = np.random.default_rng(shard)
        ids = [f"{shard:05d}{i:07d}#0" for i in range(size)]
        images = [f"coco/train2017/{shard:05d}{i:07d}.jpg" for i in range(size)]
        correct = rng.random(size * REFERENCES) < 0.3
        ranks = np.tile(np.arange(REFERENCES, dtype=np.int8), size)
        text = [f"What is the {word} thing in picture {i}? {' '.join(ids[i : i + 8])}" for i, word in enumerate(images)]
        many = np.repeat(np.arange(size), REFERENCES)
        tables = {
            "rounds": {"round_id": ids, "image": images, "question": text, "answer": ["dog"] * size, "task": ["short"] * size},
            "scores/answers": {
                "round_id": ids,
                "rank": np.full(size, -1, np.int8),
                "metric": ["match"] * size,
                "score": np.zeros(size, np.float32),
                "correct": np.zeros(size, bool),
            },
            "scores/reanswers": {
                "round_id": pa.array(ids).take(pa.array(many)),
                "rank": ranks,
                "metric": ["match"] * len(many),
                "score": correct.astype(np.float32),
                "correct": correct,
            },
            "neighbors": {
                "query_id": pa.array(images).take(pa.array(many)),
                "rank": ranks,
                "image_id": rng.integers(0, CORPUS, len(many)),
                "similarity": (0.9 - ranks / 50).astype(np.float32),
            },
        }
        for name, columns in tables.items():
            store.write_table(root / name / f"{part_name(shard, count)}.parquet", pa.table(columns), name, {"version": 1})
    names = pa.table({"image_id": range(CORPUS), "image": [f"{i}.jpg" for i in range(CORPUS)], "caption": ["a dog"] * CORPUS})
    store.write_table(root / "catalog" / f"{part_name(0, 1)}.parquet", names, "catalog", {"version": 1})
    for name, manifest in manifests(root).items():
        merge.merge(name, list(manifest.parent.glob("*.parquet")), manifest)


if __name__ == "__main__":
    main()
