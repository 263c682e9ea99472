"""Small pictures of media for notebooks, as data URLs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from flamboyance_client.fewshot import AnyQuery
from flamboyance_client.orientation import upright
from flamboyance_client.prompt import Media, encode_media, is_url

SIDE = 96  # pixels
# Without Pillow, only a small file is shown, as it is.
MAX_BYTES = 32_768
SHOWN_TYPES = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp", "image/bmp", "image/avif"})
# No browser shows this type, and Pillow reads it.
REDUCED_TYPES = SHOWN_TYPES | {"image/tiff"}


def thumbnail(media: Media) -> str | None:
    """Return an image of at most 96 x 96 pixels as a data URL, or None for what cannot be shown.

    Nothing is fetched, so an `http` URL cannot be shown, and neither can a video or the id of an upload.
    """
    try:
        data, kind = _content(media)
    except (OSError, TypeError, ValueError):
        return None
    if find_spec("PIL"):
        small = _reduced(data) if kind in REDUCED_TYPES else None
        return None if small is None else f"data:image/jpeg;base64,{_base64(small)}"
    return f"data:{kind};base64,{_base64(data)}" if kind in SHOWN_TYPES and len(data) <= MAX_BYTES else None


def query_media(query: AnyQuery | None) -> Any:
    """Return the first media item of a query, or None if it has none."""
    if not isinstance(query, Mapping):
        return query[0] if isinstance(query, list | tuple) and query else query
    if (url := query.get("image")) is not None:
        return url
    first: Any = next(iter(query.get("media") or ()), None)
    return first


def _content(media: Any) -> tuple[bytes, str]:
    """Return the bytes and the media type. Raises `ValueError` for media that are elsewhere."""
    if isinstance(media, Mapping):
        media = media.get("image_url", {}).get("url", "")
    if not is_url(media):
        return encode_media(media)
    head, _, data = media.partition(",")
    if not head.startswith("data:image/"):
        raise ValueError(f"not an image: {head[:40]}")
    return encode_media(base64.b64decode(data))


def _reduced(data: bytes) -> bytes | None:
    image_module = import_module("PIL.Image")
    stream = io.BytesIO()
    try:
        with image_module.open(io.BytesIO(data)) as image:
            image.draft("RGB", (SIDE, SIDE))  # a large JPEG file is decoded at a reduced size
            image.thumbnail((SIDE, SIDE))
            if image.mode.startswith("I;16"):  # a conversion would clip it
                image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
            upright(image).convert("RGB").save(stream, "JPEG", quality=80)
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError):
        return None
    return stream.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
