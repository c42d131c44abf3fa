"""JPEG files decoded and resized by the GPU (nvJPEG through torchvision), for `embed.decode: gpu`.

Pixels differ a little from those of Pillow, the reference: the colour planes are widened another way, and the resize rounds
once and not twice. Files that a GPU may show in another way altogether are left to Pillow: see `suits`.
"""

import io
from collections.abc import Sequence
from typing import Any

from surf.images import too_large

_EXIF_ORIENTATION = 0x0112
_END = b"\xff\xd9"


def available() -> bool:
    """Is there a GPU decoder here?"""
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        from torchvision.io import decode_jpeg  # noqa: F401
    except ImportError:  # it has left torchvision, see its release notes
        return False
    return True


def suits(data: bytes, max_pixels: int) -> bool:
    """Is it a whole, upright, plain grey or colour JPEG file of at most `max_pixels`? Reads its header only."""
    from PIL import Image

    if not data.startswith(b"\xff\xd8") or not data.rstrip(b"\0").endswith(_END):
        return False
    try:
        image = Image.open(io.BytesIO(data))
        upright = image.getexif().get(_EXIF_ORIENTATION, 1) == 1
        return image.mode in ("L", "RGB") and upright and not too_large(image.width, image.height, max_pixels)
    except Exception:  # Pillow will say what is wrong with it
        return False


def decode(files: Sequence[Any], size: tuple[int, int], device: str) -> list[Any]:
    """Each file (its bytes as uint8 tensor on the CPU) as uint8 tensor [height, width, 3] of `size` on `device`, resized
    (shortest edge, bicubic, antialiased) and cropped at the centre as open_clip does; None where it cannot be decoded."""
    import torch
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms

    found: list[Any] = [None] * len(files)
    shapes: dict[torch.Size, list[int]] = {}
    images = _decode(list(files), device)
    for number, image in enumerate(images):
        if image is not None:
            shapes.setdefault(image.shape, []).append(number)
    for numbers in shapes.values():  # most photographs of a collection have few shapes: one resize for each
        stack = torch.stack([images[number] for number in numbers])
        stack = transforms.resize(stack, [min(size)], InterpolationMode.BICUBIC, antialias=True)
        stack = transforms.center_crop(stack, list(size)).permute(0, 2, 3, 1)
        for number, pixels in zip(numbers, stack, strict=True):
            found[number] = pixels
    return found


def _decode(files: list[Any], device: str) -> list[Any]:
    """The decoder gives all or nothing: where it fails, halves are tried, until the bad files stand alone."""
    from torchvision.io import ImageReadMode, decode_jpeg

    if not files:
        return []
    try:
        return list(decode_jpeg(files, mode=ImageReadMode.RGB, device=device))
    except RuntimeError:
        middle = len(files) // 2
        return [None] if len(files) == 1 else _decode(files[:middle], device) + _decode(files[middle:], device)
