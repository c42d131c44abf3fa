"""Index and search: exact search of a whole run's query images, and large indexes built part by part.

python benchmarks/index.py [--vectors 1250000 --queries 365000] [--scaled 250000 500000] [--tiny]

Vectors are made up: unit vectors around random centres, float16 as `embed` writes them. The first table is `retrieve` from the
written index to the written neighbours, every photograph once; FAISS on the CPU answers some of the same queries beside it. The
second one builds IVF indexes on disk as for a corpus past memory (each a process of its own) and draws the line through two
sizes. The limit of exact search is the time of its multiplications at the rate of this machine's products (float16 on a GPU).
"""

import argparse
import functools
import json
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import common
import faiss
import numpy as np

from surf import build_index, config, merge, search, store
from surf.embed import _table
from surf.retrieve import retrieve
from surf.shards import part_names

CENTRES = 20_000
PART = 25_000  # vectors of a part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_250_000)
    parser.add_argument("--queries", type=int, default=365_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--faiss-queries", type=int, default=2_000, help="queries that FAISS on the CPU answers")
    parser.add_argument("--scaled", type=int, nargs=2, default=[250_000, 500_000], help="vectors of the indexes on disk")
    parser.add_argument("--target", type=int, default=100_000_000, help="vectors to extrapolate to")
    parser.add_argument("--factory", default="IVF4096,SQ8", help="of the indexes on disk; the same for both sizes")
    parser.add_argument("--only", choices=["exact", "scaled"], help="one of the two tables")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--build", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tiny:
        args.vectors, args.queries, args.dim, args.faiss_queries = 50_000, 2_000, 64, 500
        args.scaled, args.factory = [50_000, 100_000], "IVF64,SQ8"
    if args.build:
        print(json.dumps(build(Path(args.build[0]), args.build[1])))
        return
    with TemporaryDirectory() as folder:
        if args.only != "scaled":
            exact(Path(folder), args)
        if args.only != "exact":
            scaled(Path(folder), args)


def exact(folder: Path, args: argparse.Namespace) -> None:
    """The first table."""
    manifest = embeddings(folder / "whole", args.vectors, args.dim)
    print(f"{common.machine()}\n")
    corpus = [f"{i}.jpg" for i in range(args.vectors)]
    names = [f"q{i}.jpg" for i in range(args.queries)]
    queries = clustered(np.random.default_rng(10**6), args.queries, args.dim).astype(np.float32)
    steps = {}

    def step(what: str) -> None:
        steps[what] = time.perf_counter()

    out = folder / "index.faiss"
    step("build")
    index, _ = build_index.build_index(manifest, config.BuildIndex(factory="Flat"), 0, out)
    step("write the index")
    build_index.write(index, out)
    del index
    step("load the index")
    found = search.load(out)
    step("search and pick")
    table = retrieve(names, queries, found, corpus, config.Retrieve())
    step("write the neighbours")
    store.write_table(folder / "neighbors.parquet", table, "neighbors")
    step("")
    times = list(steps.values())
    seconds = {what: after - before for what, before, after in zip(steps, times, times[1:], strict=False)}
    job = sum(list(seconds.values())[2:])
    print(f"{args.vectors:,} vectors of {args.dim}, {args.queries:,} queries, {found.__class__.__name__}\n")
    print(common.table(["step", "s"], [*seconds.items(), ("`retrieve`: load, search, write", job)]), "\n", flush=True)

    few = queries[: args.faiss_queries]
    cpu = faiss.read_index(str(out))
    start = time.perf_counter()
    theirs = cpu.search(few, 26)[1]
    faiss_rate = len(few) / (time.perf_counter() - start)
    ours = found.search(few, 26)[1]
    same = np.mean([len(np.intersect1d(a, b)) for a, b in zip(theirs, ours, strict=True)]) / 26
    rate = args.queries / seconds["search and pick"]
    limit = products(args.dim) / (2 * args.vectors * args.dim)
    head = ["exact search", "queries", "queries/s", "ours ÷ it", "share of the limit", "same ids in the first 26"]
    rows = [
        ["surf, search and pick", args.queries, rate, 1.0, f"{rate / limit:.1%}", ""],
        ["FAISS on the CPU, search", len(few), faiss_rate, rate / faiss_rate, f"{faiss_rate / limit:.1%}", f"{same:.4%}"],
    ]
    print(common.table(head, rows), "\n", flush=True)


def scaled(folder: Path, args: argparse.Namespace) -> None:
    """The second table."""
    results = []
    for vectors in args.scaled:
        manifest = embeddings(folder / str(vectors), vectors, args.dim)
        if not results:
            print(f"{common.machine()}\n")
        results.append(json.loads(common.python(__file__, "--build", str(manifest), args.factory).splitlines()[-1]))
    small, large = ([found["seconds"], found["bytes"] / 1e9, found["peak_mb"]] for found in results)
    steps = (args.target - args.scaled[1]) / (args.scaled[1] - args.scaled[0])
    far = [max(a, b + (b - a) * steps) for a, b in zip(small, large, strict=True)]  # what does not grow stays as it is
    rows = [[f"{n:,}", *values, found["recall"]] for n, values, found in zip(args.scaled, (small, large), results, strict=True)]
    rows.append([f"{args.target:,} (on the line through both)", *far, ""])
    print(f"{args.factory}, built part by part ({PART:,} vectors each)\n")
    head = ["vectors", "build, recall measured, s", "on disk, GB", "peak of own memory, MiB", "recall@10"]
    print(common.table(head, rows))


def build(manifest: Path, factory: str) -> dict:
    """One index on disk, in this process: its time, size, recall and the peak of memory that is not mapped from files."""
    build_index.DISK_BYTES = 0
    out = manifest.parent / "index" / "index.faiss"
    start = time.perf_counter()
    with OwnMemory() as peak:
        index, about = build_index.build_index(manifest, config.BuildIndex(factory=factory), 0, out)
        build_index.write(index, out)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in out.parent.iterdir())
    return {"seconds": seconds, "bytes": size, "peak_mb": peak[0], "recall": about["recall_at_10"]}


class OwnMemory:
    """Peak of this process's memory that is not mapped from files (MiB), looked at twenty times a second."""

    def __enter__(self) -> list[float]:
        self.peak, self.stop = [0.0], threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self.peak

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.stop.wait(0.05):
            lines = Path("/proc/self/status").read_text().splitlines()
            self.peak[0] = max(self.peak[0], *(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")))


def embeddings(folder: Path, count: int, dim: int) -> Path:
    """Parts of `embeddings` with `count` vectors; the manifest."""
    names = part_names(-(-count // PART))
    sizes = [min(PART, count - start) for start in range(0, count, PART)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(part, range(len(sizes)), sizes, [dim] * len(sizes), [folder / f"{name}.parquet" for name in names]))
    merge.merge("embeddings", [folder / f"{name}.parquet" for name in names], folder / "_manifest.json")
    return folder / "_manifest.json"


def part(number: int, size: int, dim: int, path: Path) -> None:
    """Write one part of `embeddings`."""
    vectors = clustered(np.random.default_rng(number), size, dim)
    start = number * PART
    store.write_table(path, _table(range(start, start + size), vectors.astype(np.float32)), "embeddings", {"version": 1})


def clustered(rng: np.random.Generator, count: int, dim: int) -> np.ndarray:
    """Unit vectors around `CENTRES` points, half of their length noise; float16 [count, dim]."""
    centres = _centres(dim)
    made = np.empty((count, dim), np.float16)
    for start in range(0, count, PART):
        size = min(PART, count - start)
        vectors = centres[rng.integers(0, CENTRES, size)] + rng.standard_normal((size, dim), np.float32)
        made[start : start + size] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return made


@functools.cache
def _centres(dim: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((CENTRES, dim), np.float32)


def products(dim: int) -> float:
    """Operations a second of large matrix products: on the GPU, if there is one, of float16 numbers with float32 results."""
    import torch

    gpu = search.gpu()
    device, dtype = ("cuda", torch.float16) if gpu else ("cpu", torch.float32)
    a, b = (torch.randn((size, dim), device=device, dtype=dtype) for size in ((4096, 262_144) if gpu else (2048, 2048)))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        float((torch.mm(a, b.T, out_dtype=torch.float32) if gpu else a @ b.T)[0, 0])
        seconds.append(time.perf_counter() - start)
    return 2 * len(a) * len(b) * dim / min(seconds)


if __name__ == "__main__":
    main()
