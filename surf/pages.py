"""What all HTML pages share: templates that escape everything, images as small data URIs.

A page loads nothing from anywhere and runs no script. Captions and questions come from outside, so every value is escaped by
the template engine and nothing is ever marked as safe.
"""

import base64
import hashlib
import io
import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from surf.errors import ImageError
from surf.images import Images
from surf.prompts import cut

THUMB_PIXELS, TINY_PIXELS = 256, 128
Row = dict[str, Any]


def render(template: str, **context: Any) -> str:
    """Fill a template of this folder. Escaping is on for everything."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=lambda value: f"{value:,}", percent=percent, cut=cut)
    return environment.get_template(template).render(**context)


def percent(value: float | None, digits: int = 1) -> str:
    """0.8793 as `87.9`; a dash where there is no number."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}"


def stable(keys: Iterable[str], count: int) -> list[str]:
    """At most `count` of the keys, chosen by hash: the choice depends neither on their order nor on chance."""
    return sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())[:count]


def data_uri(data: bytes, kind: str) -> str:
    """An image as an address that needs no file."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def thumbnailer(images: Images) -> Callable[[str], Row | None]:
    """A function from an image's name to {src, width, height, tiny}; None for an image that cannot be used."""

    @lru_cache(maxsize=512)
    def thumb(name: str) -> Row | None:
        from PIL import Image

        try:
            image = images.open(name).copy()  # the original may be shared
        except ImageError:
            return None
        image.thumbnail((THUMB_PIXELS, THUMB_PIXELS), Image.Resampling.LANCZOS)
        tiny = max(image.size) <= TINY_PIXELS
        kind = "png" if tiny else "jpeg"
        sink = io.BytesIO()
        image.save(sink, kind, quality=82, optimize=True)
        return {"src": data_uri(sink.getvalue(), kind), "width": image.width, "height": image.height, "tiny": tiny}

    return thumb
