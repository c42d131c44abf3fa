"""Embedding end to end: packed JPEG files in, float16 parts out; beside the original's way and a plain use of the libraries.

python benchmarks/embed.py [--images 20000] [--modes off default] [--photographs FOLDER --pretrained openai] [--tiny]

The images are drawn: 640x480, quality 90, smooth ground, edges and grain, of the size of COCO's files. The model is ViT-L/14
with random weights unless --pretrained names some. `--tiny` runs the whole benchmark on a CPU in a minute. The limit is the
fastest matrix product of this GPU, in the same run, over the model's operations for one image.
"""

import argparse
import io
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
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
from surf.models import clip, jpeg
from surf.telemetry import Meter

DISTINCT = 500  # different drawings; more images repeat them under other names
TINY = "local-dir:surf/demo/models/clip"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--model", default="ViT-L-14-quickgelu")
    parser.add_argument("--pretrained")
    parser.add_argument("--modes", nargs="+", default=["off", "default"], help="embed.compile")
    parser.add_argument("--original", type=int, default=8, help="images that the original's way embeds")
    parser.add_argument("--photographs", type=Path, help="folder with JPEG files for the comparison of the pixels")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        args.images, args.batch_size, args.workers, args.model, args.precision = 256, 32, 2, TINY, "fp32"
    import torch

    with TemporaryDirectory() as folder:
        size = (160, 120) if args.tiny else (640, 480)
        file, mean = pack(Path(folder) / "packed.parquet", args.images, min(DISTINCT, args.images // 4), size)
        images = Images([str(file)])
        catalog = store.table_of([{"image_id": i, "image": name(i), "caption": "x"} for i in range(args.images)], "catalog")

        def options(**more: Any) -> config.Embed:
            words = {key: getattr(args, key) for key in ("model", "pretrained", "precision", "batch_size", "workers")}
            return config.Embed(**words | more)

        torch.manual_seed(0)
        flop = operations(clip.load(options(precision="fp32"), images))
        limit = tensor_flops(args.precision) / flop
        kind = f"{args.model.split('/')[-1]}, {flop / 1e9:.1f} GFLOP an image, {args.precision}, batch {args.batch_size}"
        print(f"{common.machine()}\n{kind}; JPEG files of {size[0]}x{size[1]}, {mean / 1000:.0f} KB on average\n")
        rows = [
            line(
                "the original: one image, Pillow, CPU, fp32", *original(options(precision="fp32"), images, args.original), limit
            )
        ]
        rows.append(line("plain: DataLoader, eager", *plain(options(), images, args), limit))
        for decode in ("exact", "fast"):
            for mode in args.modes:
                encoder = clip.load(options(decode=decode, compile=mode), images)
                encoder.encode([name(i) for i in range(min(args.images, 2 * args.batch_size))])  # compiles
                encoder.meter = Meter()
                out = Path(folder) / f"{decode}-{mode}" / "part-00000-of-00001.parquet"
                seconds = end_to_end(encoder, catalog, out)
                shares = encoder.meter.shares(seconds)
                busy = ", ".join(f"{what} {share:.0%}" for what, share in shares.items())
                rows.append(line(f"surf, decode {decode}, compile {mode}", args.images, seconds, limit, busy))
        base = rows[0][3]
        head = ["end to end", "images", "s", "images/s", "÷ the original", "share of the limit", "busy share of each step"]
        print(common.table(head, [[*row[:4], row[3] / base, *row[4:]] for row in rows]), "\n", flush=True)
        rates = list(stages(options, images, catalog, args))
        print(common.table(["alone", "images/s"], [*rates, ("limit: matrix products", limit)]), "\n", flush=True)
        print(common.table(["against exact pixels and fp32, cosine", "lowest", "mean"], list(closeness(options, args))))


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

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _, transform = open_clip.create_model_and_transforms(
        options.model, pretrained=options.pretrained, precision=options.precision, device=device
    )
    dtype = open_clip.get_input_dtype(options.precision) or torch.float32

    class Packed(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return args.images

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
    return args.images, time.perf_counter() - start


def stages(
    options: Callable[..., config.Embed], images: Images, catalog: pa.Table, args: argparse.Namespace
) -> Iterator[tuple[str, float]]:
    """Rate of each step by itself (images/s)."""
    import torch

    names = catalog["image"].to_pylist()
    few = names[: 4 * args.batch_size]
    start = time.perf_counter()
    for number in images.order(names):
        images.reader(names[number])()
    yield "read", len(names) / (time.perf_counter() - start)
    files = [images.read(one) for one in few]
    with ThreadPoolExecutor(args.workers) as pool:
        for what, decode in (("exact", "exact"), ("at a reduced size", "fast")):
            decoder = clip.load(options(decode=decode), images).decoder
            start = time.perf_counter()
            list(pool.map(decoder.pixels, files))
            yield f"Pillow {what}, {args.workers} threads", len(files) / (time.perf_counter() - start)
    if jpeg.available():
        batches = [files[i : i + args.batch_size] for i in range(0, len(files), args.batch_size)]
        size = clip.load(options(), images).decoder.size
        yield "nvJPEG and resize", args.batch_size * rate(lambda i: jpeg.decode(batches[i % len(batches)], size, "cuda"), 12)
    if torch.cuda.is_available():
        host = torch.zeros((args.batch_size, 224, 224, 3), dtype=torch.uint8, pin_memory=True)
        yield "transfer of uint8 pixels", args.batch_size * rate(lambda _: host.to("cuda", non_blocking=True), 100)
    for mode in args.modes:
        encoder = clip.load(options(compile=mode), images)
        pixels = torch.zeros((args.batch_size, *encoder.decoder.size, 3), dtype=torch.uint8, device=encoder.device)
        with torch.inference_mode():
            yield (
                f"model, compile {mode}",
                args.batch_size * rate(lambda _, e=encoder, p=pixels: e.features(p), 5 if args.tiny else 30),
            )


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


def tensor_flops(precision: str) -> float:
    """Operations a second of the fastest of some large matrix products."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
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


def closeness(options: Callable[..., config.Embed], args: argparse.Namespace) -> Iterator[tuple[str, float, float]]:
    """Cosines of real photographs' embeddings by the faster ways with those by the exact one."""
    import matplotlib

    folder = args.photographs or Path(matplotlib.get_data_path()) / "sample_data"
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    images = Images([str(folder)])
    weights = args.pretrained or ("the demo's weights" if args.tiny else "random weights")
    exact = clip.load(options(precision="fp32"), images)
    reference = exact.encode(names)[0]
    state = {}
    for precision in dict.fromkeys(("fp32", args.precision)):
        for decode in ("exact", "fast"):
            import torch

            torch.manual_seed(0)
            encoder = clip.load(options(precision=precision, decode=decode), images)
            state[precision, decode] = (encoder.encode(names)[0] * reference).sum(1)
    for (precision, decode), cosine in state.items():
        yield f"{precision}, decode {decode}; {len(names)} photographs, {weights}", float(cosine.min()), float(cosine.mean())


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
