"""Opening images by name, from folders and from Parquet files, with the input treated as hostile."""

import io
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from surf.errors import ImageError, SurfError

if TYPE_CHECKING:
    from PIL.Image import Image

# COCO's own numbers: train2017/000000000009.jpg and COCO_train2014_000000000009.jpg are one photograph.
_COCO = re.compile(r"(?:^|/)(?:COCO_(?:train|val|test)20\d\d_|(?:train|val|test|unlabeled)2017/)(\d{12})\.\w+$")
_UNTIDY = re.compile(r"(?:^|/)\.?(?:/|\Z)")  # an empty step or "." in a path
_CACHED_ROW_GROUPS = 4
STRIP = 200  # times its width that an image may be high, or the other way round
_ORIENTATION = 0x0112  # EXIF; 5 to 8 lie on their side


def identity(name: str) -> str:
    """What makes two names the same photograph: COCO's number where the name carries one, else the path itself."""
    match = _COCO.search(name)
    if match:
        return f"coco:{int(match[1])}"
    return (
        str(PurePosixPath(name)) if _UNTIDY.search(name) else name
    )  # a path object for each of a million names takes a minute


class Images:
    """Images under several roots; the first root that holds a name wins.

    Args:
        roots: folders, or Parquet files with columns image (string) and bytes (binary).
        max_pixels: larger images are refused before they are decoded.
        cached: decoded images kept in memory, the latest ones (a 640x480 image takes 0.9 MB).

    Raises:
        SurfError: a root does not exist or is no folder and no such Parquet file.
    """

    def __init__(self, roots: Sequence[str], max_pixels: int = 100_000_000, cached: int = 0) -> None:
        self.max_pixels = max_pixels
        self.open: Callable[[str], Image] = lru_cache(cached)(self._open) if cached else self._open
        self._sources: list[_Folder | _Packed] = []
        for root in map(Path, roots):
            if root.is_dir():
                self._sources.append(_Folder(root))
            elif root.is_file():
                self._sources.append(_Packed(root))
            else:
                raise SurfError(f"there is no image root {root}", where="images.roots", expected="a folder or a Parquet file")

    def read(self, name: str) -> bytes:
        """The file's bytes. Raises ImageError: no such image, or a name that leads out of the roots."""
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise ImageError("its name leads out of the image roots")
        for source in self._sources:
            data = source.read(name)
            if data is not None:
                return data
        raise ImageError("there is no such image in the image roots")

    def packed(self, root: str) -> dict[str, tuple[int, int]]:
        """(row group, row) of each image name of a root that is a Parquet file; empty for a folder."""
        return next((one.place for one in self._sources if isinstance(one, _Packed) and one.path == Path(root)), {})

    def order(self, names: Sequence[str]) -> list[int]:
        """Numbers into `names` in the order in which they are read best: packed images as they lie in their files."""
        places = [self._packed(name) or (-1, 0, 0) for name in names]
        return sorted(range(len(names)), key=lambda number: places[number])

    def reopen(self) -> None:
        """To be called by a forked process before it reads: from now on it shares no open file and no lock with its parent.

        It keeps one row group of a packed file in memory: enough for names in the `order` of reading.
        """
        for source in self._sources:
            if isinstance(source, _Packed):
                source.open(cached=1)

    def _packed(self, name: str) -> tuple[int, int, int] | None:
        """(number of the root, row group, row) of a packed image, or None."""
        for number, source in enumerate(self._sources):
            if isinstance(source, _Packed) and name in source.place:
                return number, *source.place[name]
        return None

    def size(self, name: str) -> tuple[int, int]:
        """Width and height of the upright image, from its header: nothing is decoded. Raises ImageError as `open` does."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.read(name))) as image:
                turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
                return (image.height, image.width) if turned else (image.width, image.height)
        except ImageError:
            raise
        except Exception as error:
            raise ImageError(f"cannot be decoded ({type(error).__name__}: {error})") from None

    def _open(self, name: str) -> "Image":
        """`open`: the decoded image, RGB, upright as its EXIF says. Raises ImageError: missing, too large, not decodable."""
        return self.decode(self.read(name))

    def decode(self, data: bytes, draft: tuple[int, int] | None = None) -> "Image":
        """The image in a file's bytes, RGB, upright as its EXIF says.

        Args:
            draft: (height, width) that will do: a JPEG file may come at a half, a quarter or an eighth of its size.

        Raises:
            ImageError: too large, not decodable.
        """
        from PIL import Image, ImageFile, ImageOps

        ImageFile.LOAD_TRUNCATED_IMAGES = False
        Image.MAX_IMAGE_PIXELS = self.max_pixels
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(data))
                if what := too_large(image.width, image.height, self.max_pixels):
                    raise ImageError(f"{image.width}x{image.height} pixels, {what}")
                if draft is not None:
                    image.draft("RGB", draft[::-1])
                image.load()
                return ImageOps.exif_transpose(image).convert("RGB")
        except ImageError:
            raise
        except Image.DecompressionBombError:
            raise ImageError("it has more pixels than images.max_pixels") from None
        except Exception as error:  # Pillow's decoders raise many kinds: any of them means one unusable image
            what = str(error).partition(" <_io.")[0]  # an address would differ from run to run
            raise ImageError(f"cannot be decoded ({type(error).__name__}: {what})") from None


def too_large(width: int, height: int, max_pixels: int) -> str:
    """Why an image is refused before it is decoded; empty if it is not.

    A long strip has few pixels, but many when it is padded to a square, or resized until its short side is as long as a model
    wants.
    """
    if width * height > max_pixels:
        return "more pixels than images.max_pixels"
    long, short = max(width, height), min(width, height)
    if long > STRIP * short or long * long > 4 * max_pixels:
        return "so long a strip that a square around it has too many pixels"
    return ""


class _Folder:
    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def read(self, name: str) -> bytes | None:
        path = (self.root / name).resolve()
        if not path.is_relative_to(self.root):
            raise ImageError("a symbolic link leads out of the image roots")
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ImageError(f"cannot be read ({error.strerror})") from None


class _Packed:
    """Images in one Parquet file: names are read once, bytes by row group."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.path = path
        try:
            self.open(_CACHED_ROW_GROUPS)
            names = self.file.schema_arrow.names
        except (OSError, pa.ArrowException) as error:
            raise SurfError(f"is no Parquet file ({error})", where=str(path), expected="an image root") from None
        if not {"image", "bytes"} <= set(names):
            raise SurfError(f"has columns {names}", where=str(path), expected="columns image and bytes")
        self.place: dict[str, tuple[int, int]] = {}
        listed = iter(self.file.read(columns=["image"]).column("image").to_pylist())
        for group in range(self.file.num_row_groups):
            rows = range(self.file.metadata.row_group(group).num_rows)
            self.place.update((name, (group, row)) for row, name in zip(rows, listed, strict=False))

    def open(self, cached: int) -> None:
        import pyarrow.parquet as pq

        self.file, self.cached = pq.ParquetFile(self.path), cached
        self.cache: OrderedDict[int, object] = OrderedDict()
        self.lock = threading.Lock()  # a ParquetFile is not safe to read from several threads

    def read(self, name: str) -> bytes | None:
        if name not in self.place:
            return None
        group, row = self.place[name]
        with self.lock:
            if group not in self.cache:
                while len(self.cache) >= self.cached:
                    self.cache.popitem(last=False)
                self.cache[group] = self.file.read_row_group(group, columns=["bytes"], use_threads=False).column("bytes")
            return bytes(self.cache[group][row].as_py())  # type: ignore[index]
