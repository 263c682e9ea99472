"""Detects truncated media files for which a decoder reports no error but fills the missing pixels.

The exact checks read the whole file again, so they run only if the last pixel of an image has the fill colour.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import av
from PIL import Image
from PIL.TiffImagePlugin import (
    PLANAR_CONFIGURATION,
    ROWSPERSTRIP,
    SAMPLESPERPIXEL,
    STRIPBYTECOUNTS,
    STRIPOFFSETS,
    TILEBYTECOUNTS,
    TILELENGTH,
    TILEOFFSETS,
    TILEWIDTH,
    TiffImageFile,
)

# TIFF's planes of one channel each, and the orientations that exchange width and height
SEPARATE_PLANES = 2
ORIENTATION, SIDEWAYS = 274, (5, 6, 7, 8)
# Matroska's element of all media data
SEGMENT_ID = 0x18538067
# libjpeg's colour for blocks without data: middle grey, which is 127 in an inverted CMYK
NEUTRAL = {127, 128}
# a block of 64 pixels takes two bits of a sequential JPEG, so a file with more than this has no data or is progressive
MAX_PIXELS_PER_BYTE = 256
# a PNG's colour type -> channels
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PNG_SIGNATURE_BYTES = 8
PIECE_BYTES = 2**24


def has_no_pixels(data: bytes, size: tuple[int, int]) -> bool:
    """Return whether a JPEG has too few bytes for its size; libjpeg would take seconds to fill a large image."""
    is_small = size[0] * size[1] > MAX_PIXELS_PER_BYTE * len(data)
    return is_small and data.startswith(b"\xff\xd8") and _jpeg_ends_early(data)


def still_ends_early(data: bytes) -> bool:
    """Return whether a HEIF still lacks data; libheif would fill missing tiles with grey."""
    return _boxes_end(data) > len(data)


def image_ends_early(data: bytes, image: Image.Image) -> bool:
    """Return whether a decoded JPEG or PNG lacks data; PIL itself detects this for the other formats."""
    last = image.getpixel((image.width - 1, image.height - 1))
    values = set(last) if isinstance(last, tuple) else {last}
    if data.startswith(b"\xff\xd8"):
        return values <= NEUTRAL and _jpeg_ends_early(data)
    return data.startswith(b"\x89PNG") and values == {0} and _png_ends_early(data)


def lacks_strips(image: TiffImageFile) -> bool:
    """Return whether a TIFF's table has fewer strips or tiles than its pixels need; libtiff reads other bytes instead."""
    tags, (width, height) = image.tag_v2, image.size
    if tags.get(ORIENTATION) in SIDEWAYS:
        width, height = height, width
    offsets, sizes = (TILEOFFSETS, TILEBYTECOUNTS) if TILEOFFSETS in tags else (STRIPOFFSETS, STRIPBYTECOUNTS)
    columns = -(-width // max(1, tags.get(TILEWIDTH, width))) if offsets == TILEOFFSETS else 1
    rows = -(-height // max(1, tags.get(TILELENGTH if offsets == TILEOFFSETS else ROWSPERSTRIP, height)))
    planes = tags.get(SAMPLESPERPIXEL, 1) if tags.get(PLANAR_CONFIGURATION) == SEPARATE_PLANES else 1
    num_whole = sum(size > 0 for size in tags.get(sizes, ()))
    return min(len(tags.get(offsets, ())), num_whole) < columns * rows * planes


def _jpeg_ends_early(data: bytes) -> bool:
    """Return whether FFmpeg reports missing data, which libjpeg only warns of; False for variants that it cannot read."""
    context = av.CodecContext.create("mjpeg", "r")
    context.options = {"err_detect": "explode"}
    try:
        context.decode(av.Packet(data))
        context.decode(None)
    except av.InvalidDataError:
        return True
    except av.FFmpegError:
        return False
    return False


def _png_ends_early(data: bytes) -> bool:
    """Return whether the compressed stream ends before the last row; for interlaced files, PIL detects this itself."""
    chunks = _png_chunks(data)
    header = next((body for name, body in chunks if name == b"IHDR"), bytes(13))
    width, height, depth, colour, _, _, is_interlaced = struct.unpack_from(">IIBBBBB", header)
    num_missing = height * (1 + -(-width * depth * PNG_CHANNELS[colour] // 8))
    inflater = zlib.decompressobj()
    for body in (body for name, body in chunks if name == b"IDAT"):
        while body and num_missing > 0 and not is_interlaced:
            num_missing -= len(inflater.decompress(body, PIECE_BYTES))
            body = inflater.unconsumed_tail
    return not is_interlaced and num_missing > len(inflater.flush())


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the name and the content of each chunk, which follow its length; a checksum ends it."""
    offset = PNG_SIGNATURE_BYTES
    while offset + 8 <= len(data):
        size = int.from_bytes(data[offset : offset + 4], "big")
        yield data[offset + 4 : offset + 8], data[offset + 8 : offset + 8 + size]
        offset += size + 12


def video_ends_early(data: bytes, video_format: str) -> bool:
    """Return whether bytes are missing at the end according to the container; FFmpeg would ignore this silently."""
    return _boxes_end(data) > len(data) if video_format == "mp4" else _segment_end(data) > len(data)


def _boxes_end(data: bytes) -> int:
    """Return the end of the file's last MP4 box; each begins with its size, which includes itself."""
    offset = 0
    while offset + 8 <= len(data):
        size, head = int.from_bytes(data[offset : offset + 4], "big"), 8
        if size == 1:
            size, head = int.from_bytes(data[offset + 8 : offset + 16], "big"), 16
        if size < head:  # 0 means up to the end of the file; any other value is not a box
            return len(data)
        offset += size
    return offset


def _segment_end(data: bytes) -> int:
    """Return the end of the Matroska segment, the second element of the file, which holds all the rest."""
    _, offset = _ebml_number(data, 0, keeps_marker=True)
    size, offset = _ebml_number(data, offset)
    name, start = _ebml_number(data, offset + size, keeps_marker=True)
    size, offset = _ebml_number(data, start)
    is_open = size + 1 == 1 << 7 * (offset - start)  # all ones: the size was unknown when it was written
    return offset + size if name == SEGMENT_ID and not is_open else len(data)


def _ebml_number(data: bytes, offset: int, *, keeps_marker: bool = False) -> tuple[int, int]:
    """Return the EBML number at an offset, and its end; the number of its leading zero bits gives its length in bytes."""
    first = data[offset] if offset < len(data) else 0
    length = 9 - first.bit_length()
    value = int.from_bytes(data[offset : offset + length], "big")
    return value if keeps_marker else value & ((1 << 7 * length) - 1), offset + length
