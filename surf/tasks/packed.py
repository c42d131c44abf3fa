"""Public files that carry their images inside: Parquet of the Hugging Face hub, VLMEvalKit's TSV, CIFAR-10's batches.

An image inside such a file has no name that is its own in the world (`0.jpg`, `test-00000/7`), so it is named by its
content: readers and `surf.tasks.unpack` agree without knowing of each other, and two files never share a name by chance.
"""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

from surf.errors import SurfError
from surf.tasks import files
from surf.tasks.files import Row, short

_IMAGE_COLUMNS = ("image", "img")
_PIXELS = 3 * 32 * 32
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def name(data: bytes) -> str:
    """The name of an image that is known by its bytes alone: `packed/` and half of their SHA-256."""
    return f"packed/{hashlib.sha256(data).hexdigest()[:32]}"


def rows(path: Path) -> Iterator[tuple[str, Row, bytes]]:
    """(place, the other columns, image bytes) of every row of a `.parquet` or `.tsv` file.

    Parquet: the image is a column `image` or `img` of {bytes, path}, as the library `datasets` writes it. TSV: a header,
    and base64 under `image`; a short number there stands for the image of the row with that `index` (VLMEvalKit).

    Raises:
        SurfError: not such a file, or a row without an image.
    """
    yield from _tsv(path) if path.suffix == ".tsv" else _parquet(path)


def class_names(path: Path) -> list[str]:
    """The class names that a hub Parquet file's schema gives for its column `label`; none if it gives none."""
    import json

    import pyarrow.parquet as pq

    metadata = pq.read_schema(path).metadata or {}
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return [str(entry) for entry in features.get("label", {}).get("names", [])]


def cifar10(path: Path, split: str) -> Iterator[tuple[str, int, bytes]]:
    """(place, class number, pixels: 3,072 bytes, 32x32 rows of red, then green, then blue) of CIFAR-10's binary version.

    Source: cs.toronto.edu/~kriz/cifar.html: records of 1 label byte and 3,072 pixel bytes.

    Args:
        path: one `.bin` file, or the folder `cifar-10-batches-bin`.
        split: of a folder, train or test.

    Raises:
        SurfError: no such file, a broken record, a label above 9, another split.
    """
    batches = [path]
    if path.is_dir():
        if split not in ("train", "test"):
            raise SurfError(f"has no split {split!r}", where=str(path), expected="train or test")
        batches = [path / "test_batch.bin"] if split == "test" else [path / f"data_batch_{n}.bin" for n in range(1, 6)]
    for batch in batches:
        try:
            content = batch.read_bytes()
        except OSError as error:
            raise SurfError(f"cannot be read ({error.strerror})", where=str(batch), expected="a batch of CIFAR-10") from None
        if not content or len(content) % (1 + _PIXELS):
            raise SurfError(
                f"holds {len(content)} bytes",
                where=str(batch),
                expected=f"records of {1 + _PIXELS} bytes: CIFAR-10's binary version",
            )
        for number, start in enumerate(range(0, len(content), 1 + _PIXELS), 1):
            place = f"{batch}, record {number}"
            if content[start] >= len(CIFAR10):
                raise SurfError(f"has label {content[start]}", where=place, expected="a label from 0 to 9")
            yield place, content[start], content[start + 1 : start + 1 + _PIXELS]


def png(pixels: bytes) -> bytes:
    """A CIFAR-10 image as a PNG file."""
    import numpy as np
    from PIL import Image

    planes = np.frombuffer(pixels, dtype=np.uint8).reshape(3, 32, 32)
    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0))).save(sink, "PNG")
    return sink.getvalue()


def _parquet(path: Path) -> Iterator[tuple[str, Row, bytes]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise SurfError(f"cannot be read ({files.reason(error)})", where=str(path), expected="a Parquet file") from None
    column = next((key for key in _IMAGE_COLUMNS if key in file.schema_arrow.names), None)
    if column is None:
        found = f"has columns {file.schema_arrow.names}"
        raise SurfError(found, where=str(path), expected=f"a column {' or '.join(_IMAGE_COLUMNS)} of {{bytes, path}}")
    number = 0
    for batch in file.iter_batches(batch_size=256):
        for row in batch.to_pylist():
            number += 1
            image = row.pop(column)
            data = image.get("bytes") if isinstance(image, dict) else image
            place = f"{path}, row {number}"
            if not isinstance(data, bytes) or not data:
                raise SurfError(f"{column} is {short(image)}", where=place, expected="the image's bytes")
            yield place, row, data


def _tsv(path: Path) -> Iterator[tuple[str, Row, bytes]]:
    import base64
    import binascii

    import pyarrow as pa
    import pyarrow.csv as csv

    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline().rstrip("\r\n").split("\t")
        table = csv.read_csv(
            path,
            read_options=csv.ReadOptions(block_size=min(max(path.stat().st_size, 1 << 20), 2**31 - 1), use_threads=False),
            parse_options=csv.ParseOptions(delimiter="\t", newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types={key: pa.string() for key in header}, strings_can_be_null=False),
        )
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise SurfError(f"cannot be read ({files.reason(error)})", where=str(path), expected="a TSV file") from None
    if not {"index", "image"} <= set(header):
        raise SurfError(f"has columns {header}", where=str(path), expected="columns index and image")
    content = table.to_pylist()
    texts = {row["index"]: row["image"] for row in content}
    for number, row in enumerate(content, 1):
        text = row.pop("image")
        place = f"{path}, row {number}"
        try:
            data = base64.b64decode(texts.get(text, text), validate=True)
        except binascii.Error:
            data = b""
        if not data:
            raise SurfError(f"image is {short(text)}", where=place, expected="an image in base64, or the index of another row")
        yield place, row, data
