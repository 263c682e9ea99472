"""Arrays of pixels as PNG files, so that NumPy and Pillow are not dependencies."""

from __future__ import annotations

import struct
import zlib
from typing import Any, Protocol

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, COLOUR = 0, 2  # PNG's colour types
# Photographs hardly become smaller with more effort.
COMPRESSION = 1


class Array(Protocol):
    """The part of `numpy.ndarray` that the client uses."""

    @property
    def dtype(self) -> Any: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def tobytes(self) -> bytes: ...


def encode_png(array: Array) -> bytes:
    """Return an image of shape [height, width, 3] (RGB) or [height, width] (grey) and dtype uint8 as a PNG file.

    Raises `ValueError` for another shape or dtype.
    """
    shape = tuple(array.shape)
    if str(array.dtype) != "uint8" or not is_picture(array) or 0 in shape:
        raise ValueError(
            f"an array of dtype {array.dtype} and shape {list(shape)} is not an image: "
            "expected dtype uint8 and shape [height, width, 3] or [height, width]"
        )
    height, width = shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8, COLOUR if len(shape) == 3 else GREY, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(_rows(array, height), COMPRESSION)), (b"IEND", b""))
    return SIGNATURE + b"".join(_chunk(name, data) for name, data in chunks)


def is_picture(array: Array) -> bool:
    """Return whether an array has the shape of one image."""
    shape = tuple(array.shape)
    return len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)


def _rows(array: Array, height: int) -> bytes:
    """Return the pixels with a byte 0 before each row: the row is not filtered."""
    pixels = array.tobytes()
    stride = len(pixels) // height
    return b"".join(b"\0" + pixels[start : start + stride] for start in range(0, len(pixels), stride))


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
