"""Images are hostile input: every bad one is an ImageError with a reason, and nothing outside the roots is ever read."""

import io
import struct
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from surf.errors import ImageError, SurfError
from surf.images import Images, identity


def png(colour="red", size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    (folder / "a").mkdir(parents=True)
    (folder / "a/red.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png("blue"))
    return folder


def packed(path, images, group=2):
    table = pa.table({"image": list(images), "bytes": pa.array(list(images.values()), pa.binary())})
    pq.write_table(table, path, row_group_size=group)
    return path


def test_folder_and_parquet_are_searched_in_order(root, tmp_path):
    file = packed(tmp_path / "p.parquet", {"a/red.png": png("green"), "b.png": png("blue"), "c.png": png("white")})
    assert Images([str(root), str(file)]).open("a/red.png").getpixel((0, 0)) == (255, 0, 0)
    assert Images([str(file), str(root)]).open("a/red.png").getpixel((0, 0)) == (0, 128, 0)
    both = Images([str(root), str(file)], cached=2)
    assert [both.open(name).getpixel((0, 0)) for name in ("b.png", "c.png", "b.png")] == [(0, 0, 255), (255,) * 3, (0, 0, 255)]


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/etc/passwd", "", "..\\secret.png", "a\0b", ".."])
def test_names_that_lead_out_are_refused(root, name):
    with pytest.raises(ImageError, match="leads out of the image roots"):
        Images([str(root)]).open(name)


def test_links_that_lead_out_are_refused(root, tmp_path):
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "inside.png").symlink_to(root / "a/red.png")
    with pytest.raises(ImageError, match="symbolic link leads out"):
        Images([str(root)]).open("link.png")
    assert Images([str(root)]).open("inside.png").size == (8, 6)


def bomb():
    """A PNG of a few dozen bytes that says it is 60,000 x 60,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot be decoded"),
        (b"<html>not found</html>", "cannot be decoded"),
        (png(size=(64, 64))[:60], "cannot be decoded"),
        (bomb(), "more pixels than images.max_pixels"),
        (png(size=(201, 1)), "so long a strip"),
        (png(size=(300, 30_000)), "so long a strip"),
    ],
)
def test_bad_files_are_image_errors(root, data, reason):
    (root / "bad.png").write_bytes(data)
    with pytest.raises(ImageError, match=reason):
        Images([str(root)]).open("bad.png")


def test_missing_image_and_a_folder_in_its_place(root):
    images = Images([str(root)])
    with pytest.raises(ImageError, match="no such image"):
        images.open("a/blue.png")
    with pytest.raises(ImageError, match="cannot be read"):
        images.open("a")


def test_any_mode_becomes_upright_rgb(root):
    rotated = Image.new("L", (4, 2), 7)
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.save(root / "turned.jpg", exif=exif)
    Image.new("P", (3, 3)).save(root / "palette.gif")
    Image.new("RGBA", (3, 3), (1, 2, 3, 0)).save(root / "alpha.png")
    images = Images([str(root)])
    assert images.open("turned.jpg").size == (2, 4)
    for name in ("turned.jpg", "palette.gif", "alpha.png"):
        assert images.open(name).mode == "RGB"
        assert images.size(name) == images.open(name).size


def test_wrong_roots_are_told(tmp_path):
    with pytest.raises(SurfError, match="no image root"):
        Images([str(tmp_path / "nowhere")])
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(SurfError, match="no Parquet file"):
        Images([str(tmp_path / "x.txt")])
    pq.write_table(pa.table({"name": ["a"]}), tmp_path / "y.parquet")
    with pytest.raises(SurfError, match="expected columns image and bytes"):
        Images([str(tmp_path / "y.parquet")])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("coco/train2017/000000310196.jpg", "COCO_val2014_000000310196.jpg", True),
        ("coco/train2017/000000310196.jpg", "val2017/000000310196.jpg", True),
        ("coco/train2017/000000310196.jpg", "COCO_val2014_000000310197.jpg", False),
        ("sam/images/sa_1.jpg", "sam/images/sa_1.jpg", True),
        ("corpus/000000310196.jpg", "sft/000000310196.jpg", False),
        ("a//b.jpg", "a/b.jpg", True),
    ],
)
def test_identity_of_photographs(one, other, same):
    assert (identity(one) == identity(other)) is same
