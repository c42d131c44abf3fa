"""Embedding end to end: packed JPEG files in, float16 parts out; beside the original's way and a plain use of the libraries.

python benchmarks/embed.py [--images 50000] [--photographs FOLDER --pretrained openai] [--tiny]

The images are drawn: 640x480, quality 90, smooth ground, edges and grain, of the size of COCO's files. The model is ViT-L/14
with random weights unless --pretrained names some. `--tiny` runs the whole benchmark on a CPU in a minute. The limit is the
fastest matrix product of this GPU in 16 bits, in the same run, over the model's operations for one image.
"""

import argparse
import dataclasses
import functools
import io
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from surf import config, store
from surf.embed import embed
from surf.images import Images
from surf.models import clip, jpeg, pipeline
from surf.telemetry import Meter

DISTINCT = 500  # different drawings; more images repeat them under other names
WAYS = [  # embed.decode (behind embed.gpu_share in per cent), embed.precision, embed.compile
    ("30% gpu", "bf16", "default"),
    ("30% gpu", "fp8", "default"),
    ("50% gpu", "fp8", "default"),
    ("draft", "bf16", "default"),
    ("draft", "fp8", "default"),
    ("exact", "bf16", "default"),
    ("gpu", "fp8", "default"),
    ("gpu", "bf16", "default"),
]
TINY_WAYS = [("exact", "bf16", "off"), ("draft", "bf16", "default")]
PLAIN = 16_000  # images for the plain DataLoader, at most
TINY = "local-dir:surf/demo/models/clip"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--model", default="ViT-L-14-quickgelu")
    parser.add_argument("--pretrained")
    parser.add_argument("--original", type=int, default=8, help="images that the original's way embeds")
    parser.add_argument("--photographs", type=Path, help="folder with JPEG files for the comparison of the pixels")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        args.images, args.batch_size, args.workers, args.model = 256, 32, 2, TINY
    import torch

    with TemporaryDirectory() as folder:
        size = (160, 120) if args.tiny else (640, 480)
        file, mean = pack(Path(folder) / "packed.parquet", args.images, min(DISTINCT, args.images // 4), size)
        images = Images([str(file)])
        catalog = store.table_of([{"image_id": i, "image": name(i), "caption": "x"} for i in range(args.images)], "catalog")

        def options(decode: str, precision: str, compile: str) -> config.Embed:
            words = {key: getattr(args, key) for key in ("model", "pretrained", "batch_size", "workers")}
            share, _, kind = decode.rpartition(" ")
            words["gpu_share"] = float(share.rstrip("%")) / 100 if share else 1.0
            return config.Embed(**words, decode=kind, precision=precision, compile=compile)

        @functools.cache
        def loaded(precision: str) -> clip.Clip:
            torch.manual_seed(0)
            with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # random weights are made there
                return clip.load(options("exact", precision, "off"), images)

        @functools.cache
        def encoder(decode: str, precision: str, compile: str) -> clip.Clip:
            base = loaded(precision)
            own = clip.Clip(base.model, base.transform, images, options(decode, precision, compile), base.device)
            own.features = features(own, precision, compile)
            return own

        compiled: dict[tuple[str, str], Callable[..., Any]] = {}

        def features(own: clip.Clip, *mode: str) -> Callable[..., Any]:
            return compiled.setdefault(mode, own.features)  # type: ignore[arg-type] # ways that differ in decoding share it

        flop = operations(encoder("exact", "fp32", "off"))
        limit = tensor_flops() / flop
        kind = f"{args.model.split('/')[-1]}, {flop / 1e9:.1f} GFLOP an image, batch {args.batch_size}"
        print(f"{common.machine()}\n{kind}; JPEG files of {size[0]}x{size[1]}, {mean / 1000:.0f} KB on average\n", flush=True)
        exact = options("exact", "fp32", "off")
        rows: list[list[Any]] = []

        def measured(*row: Any) -> None:
            rows.append(line(*row))
            print(rows[-1], flush=True)

        measured("the original: one image, Pillow, CPU, fp32", *original(exact, images, args.original), limit)
        measured("plain: DataLoader, eager, bf16", *plain(options("exact", "bf16", "off"), images, args), limit)
        ways = TINY_WAYS if args.tiny else WAYS
        for way in ways:
            encoder(*way).encode([name(i) for i in range(min(args.images, 2 * args.batch_size))])  # compiles
            encoder(*way).meter = Meter()
            out = Path(folder) / "-".join(way) / "part-00000-of-00001.parquet"
            seconds = end_to_end(encoder(*way), catalog, out)
            shares = encoder(*way).meter.shares(seconds)
            busy = ", ".join(f"{what} {share:.0%}" for what, share in shares.items())
            measured("surf, decode {}, {}, compile {}".format(*way), args.images, seconds, limit, busy)
        base = rows[0][3]
        head = ["end to end", "images", "s", "images/s", "÷ the original", "share of the limit", "busy share of each step"]
        print(common.table(head, [[*row[:4], row[3] / base, *row[4:]] for row in rows]), "\n", flush=True)
        rates = list(stages(encoder, ways, images, catalog, args))
        print(common.table(["alone", "images/s"], [*rates, ("limit: matrix products in bf16", limit)]), "\n", flush=True)
        print(common.table(["against exact pixels and fp32, cosine", "lowest", "mean"], list(closeness(encoder, ways, args))))


def line(what: str, count: int, seconds: float, limit: float, busy: str = "") -> list[Any]:
    return [what, count, seconds, count / seconds, f"{count / seconds / limit:.1%}", busy]


def end_to_end(encoder: clip.Clip, catalog: pa.Table, out: Path) -> float:
    """Seconds from the catalog to the written part."""
    start = time.perf_counter()
    table, errors = embed(catalog, encoder, store.Partial(out, "embeddings"))
    with encoder.meter("write"):
        store.write_table(out, table, "embeddings")
    if errors:
        raise AssertionError(errors)
    return time.perf_counter() - start


def original(options: config.Embed, images: Images, count: int) -> tuple[int, float]:
    """(images, seconds) of the original's loop: one image at a time, the model on the CPU."""
    import open_clip
    import torch

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # random weights are made there
        model, _, transform = open_clip.create_model_and_transforms(options.model, pretrained=options.pretrained)
    start = time.perf_counter()
    with torch.no_grad():
        for number in range(count):
            torch.nn.functional.normalize(model.encode_image(transform(images.open(name(number))).unsqueeze(0)), dim=-1)
    return count, time.perf_counter() - start


def plain(options: config.Embed, images: Images, args: argparse.Namespace) -> tuple[int, float]:
    """(images, seconds) with a DataLoader of open_clip's transform and the eager model, as one writes it down."""
    import open_clip
    import torch

    count = min(args.images, PLAIN)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model, _, transform = open_clip.create_model_and_transforms(
            options.model, pretrained=options.pretrained, precision=options.precision, device=device
        )
    dtype = open_clip.get_input_dtype(options.precision) or torch.float32

    class Packed(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return count

        def __getitem__(self, number: int) -> Any:
            return transform(images.open(name(number)))

    loader = torch.utils.data.DataLoader(
        Packed(), args.batch_size, num_workers=args.workers, pin_memory=device == "cuda", multiprocessing_context="fork"
    )
    found = []
    start = time.perf_counter()
    with torch.inference_mode():
        for pixels in loader:
            features = model.encode_image(pixels.to(device, dtype, non_blocking=True)).float()
            found.append(torch.nn.functional.normalize(features, dim=-1).half().cpu())
    return count, time.perf_counter() - start


def stages(
    encoder: Callable[..., clip.Clip],
    ways: list[tuple[str, str, str]],
    images: Images,
    catalog: pa.Table,
    args: argparse.Namespace,
) -> Iterator[tuple[str, float]]:
    """Rate of each step by itself (images/s)."""
    import torch

    names = catalog["image"].to_pylist()
    few = names[: 4 * args.batch_size]
    start = time.perf_counter()
    for number in images.order(names):
        images.read(names[number])
    yield "read", len(names) / (time.perf_counter() - start)
    files = [images.read(one) for one in few]
    exact = encoder("exact", "fp32", "off").decoder
    many = names[: 16 * args.batch_size]
    for what, decoder in (("exact", exact), ("draft", dataclasses.replace(exact, draft=True))):
        start = time.perf_counter()
        made = pipeline.batches(
            many, decoder, batch_size=args.batch_size, workers=args.workers, pinned=torch.cuda.is_available(), meter=Meter()
        )
        count = sum(len(batch.numbers) for batch in made)
        yield f"read and decode {what}, {args.workers} processes", count / (time.perf_counter() - start)
    if jpeg.available():
        encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
        batches = [encoded[i : i + args.batch_size] for i in range(0, len(encoded), args.batch_size)]
        decode = lambda i: jpeg.decode(batches[i % len(batches)], exact.size, "cuda")  # noqa: E731
        yield "nvJPEG and resize", args.batch_size * rate(decode, 12)
    if torch.cuda.is_available():
        host = torch.zeros((args.batch_size, 224, 224, 3), dtype=torch.uint8, pin_memory=True)
        yield "transfer of uint8 pixels", args.batch_size * rate(lambda _: host.to("cuda", non_blocking=True), 100)
    for precision, mode in dict.fromkeys(way[1:] for way in ways):
        own = encoder(next(way[0] for way in ways if way[1:] == (precision, mode)), precision, mode)
        pixels = torch.zeros((args.batch_size, *exact.size, 3), dtype=torch.uint8, device=own.device)
        with torch.inference_mode():
            model = lambda _, e=own, p=pixels: e.features(p)  # noqa: E731
            yield f"model, {precision}, compile {mode}", args.batch_size * rate(model, 5 if args.tiny else 30)


def rate(run: Callable[[int], Any], times: int) -> float:
    """Runs a second, after three to warm up."""
    for number in range(3):
        run(number)
    synchronize()
    start = time.perf_counter()
    for number in range(times):
        run(number)
    synchronize()
    return times / (time.perf_counter() - start)


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tensor_flops() -> float:
    """Operations a second of the fastest of some large matrix products: bfloat16 on a GPU, else float32."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    best = 0.0
    for size in (4096, 8192) if device == "cuda" else (1024,):
        a, b = (torch.randn((size, size), device=device, dtype=dtype) for _ in range(2))
        best = max(best, 2 * size**3 * rate(lambda _, a=a, b=b: a @ b, 50 if device == "cuda" else 3))
    return best


def operations(encoder: clip.Clip) -> int:
    """Floating point operations of the model for one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    pixels = torch.zeros((1, *encoder.decoder.size, 3), dtype=torch.uint8, device=encoder.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder.features(pixels)
    return counter.get_total_flops()


def closeness(
    encoder: Callable[..., clip.Clip], ways: list[tuple[str, str, str]], args: argparse.Namespace
) -> Iterator[tuple[str, float, float]]:
    """Cosines of real photographs' embeddings by the faster ways with those by the exact one."""
    import matplotlib

    folder = args.photographs or Path(matplotlib.get_data_path()) / "sample_data"
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    weights = args.pretrained or ("the demo's weights" if args.tiny else "random weights")

    def vectors(*way: str) -> np.ndarray:
        own = encoder(*way)
        before, own.decoder = own.decoder, dataclasses.replace(own.decoder, images=Images([str(folder)]))
        found, errors = own.encode(names)
        own.decoder = before
        if errors:
            raise AssertionError(errors)
        return found

    reference = vectors("exact", "fp32", "off")
    for way in ways:
        cosine = (vectors(*way) * reference).sum(1)
        what = "decode {}, {}, compile {}".format(*way)
        yield f"{what}; {len(names)} photographs, {weights}", float(cosine.min()), float(cosine.mean())


def pack(path: Path, count: int, distinct: int, size: tuple[int, int]) -> tuple[Path, float]:
    """Write `count` images into one packed file; (the file, mean size of an image in bytes)."""
    with ProcessPoolExecutor() as pool:
        files = list(pool.map(draw, range(distinct), [size] * distinct, chunksize=8))
    group = 512
    schema = pa.schema([("image", pa.string()), ("bytes", pa.binary())])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, count, group):
            numbers = range(start, min(start + group, count))
            writer.write_table(pa.table([[name(i) for i in numbers], [files[i % distinct] for i in numbers]], schema=schema))
    return path, float(np.mean([len(data) for data in files]))


def draw(seed: int, size: tuple[int, int]) -> bytes:
    """One JPEG file: coloured ground, shapes with sharp edges, grain."""
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    width, height = size
    ground = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(ground)
    for _ in range(60):
        x, y = rng.integers(0, width), rng.integers(0, height)
        w, h = rng.integers(2, width // 4), rng.integers(2, height // 4)
        colour = tuple(int(value) for value in rng.integers(0, 255, 3))
        (pen.ellipse if rng.random() < 0.5 else pen.rectangle)((x, y, x + w, y + h), outline=colour, fill=None)
    grain = rng.normal(0, 9, (height, width, 1))
    pixels = np.clip(np.asarray(ground, np.float32) + grain, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def name(number: int) -> str:
    return f"{number:08d}.jpg"


if __name__ == "__main__":
    main()
