"""How fast `surf.check` looks at images, in a folder and packed, beside decoding them in full with Pillow.

    python benchmarks/headers.py [--images 6000]

JPEGs of 640 x 480, quality 90, drawn with noise (some 140 kB each, as COCO's); all figures are of one process.
"""

import argparse
import io
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from surf import headers
from surf.images import Images

KINDS = 50  # different pictures; each is written many times
ROW_GROUP = 256


def draw(count: int, rng: np.random.Generator) -> list[bytes]:
    """`count` JPEGs: soft patches of colour under noise."""
    pictures = []
    for _ in range(count):
        patches = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
        noisy = np.asarray(patches, np.float32) + rng.normal(0, 8, (480, 640, 3))
        sink = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(sink, "JPEG", quality=90)
        pictures.append(sink.getvalue())
    return pictures


def write(root: Path, names: Sequence[str], pictures: Sequence[bytes]) -> Path:
    """The images as files below `root`, and packed into one Parquet file beside it, as docs/data.md packs them."""
    schema = pa.schema([("image", pa.string()), ("bytes", pa.binary())])
    packed = root.with_suffix(".parquet")
    root.mkdir()
    with pq.ParquetWriter(packed, schema, compression={"image": "zstd", "bytes": "none"}, use_dictionary=False) as writer:
        for start in range(0, len(names), ROW_GROUP):
            chunk = names[start : start + ROW_GROUP]
            data = [pictures[(start + number) % len(pictures)] for number in range(len(chunk))]
            for name, content in zip(chunk, data, strict=True):
                (root / name).write_bytes(content)
            writer.write_table(pa.table({"image": chunk, "bytes": data}, schema=schema))
    return packed


def rate(work: Callable[[Sequence[str]], object], names: Sequence[str]) -> float:
    """Images a second of processor time (other work on the machine does not count): the best of three."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        work(names)
        seconds.append(time.process_time() - start)
    return len(names) / min(seconds)


def look(root: Path, names: Sequence[str], *, hashes: bool = False) -> None:
    """`headers.look` in this process; every image must be fine."""
    found = headers.look(names, [str(root)], 100_000_000, hashes=hashes)
    if found.errors:
        raise RuntimeError(f"unexpected: {found.errors}")


def decode(root: Path, names: Sequence[str]) -> None:
    """Every image in full, as the stages open it."""
    images = Images([str(root)])
    for name in names:
        images.open(name)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=6000, help="images; a tenth of them is decoded")
    count = parser.parse_args().images
    names = [f"{number:012d}.jpg" for number in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        pictures = draw(KINDS, np.random.default_rng(0))
        packed = write(root, names, pictures)
        few = names[: count // 10]
        print(f"{count} JPEGs of 640x480, {np.mean([len(one) for one in pictures]) / 1000:.0f} kB each; file cache warm\n")
        print("| Images in | headers (ours) | decoded in full (Pillow) | ratio | difference hash (ours), 1/8 scale |")
        print("| --- | --- | --- | --- | --- |")
        for place, where in (("a folder", root), ("a Parquet file", packed)):
            ours = rate(lambda own, where=where: look(where, own), names)
            full = rate(lambda own, where=where: decode(where, own), few)
            hashed = rate(lambda own, where=where: look(where, own, hashes=True), few)
            print(f"| {place} | {ours:,.0f} | {full:,.0f} | {ours / full:.0f} | {hashed:,.0f} |")
    print(f"\nImages a second of one core. {platform.machine()}, {len(os.sched_getaffinity(0))} cores shared with other work,")
    print(f"Python {platform.python_version()}, Pillow {Image.__version__}, pyarrow {pa.__version__}")


if __name__ == "__main__":
    main()
