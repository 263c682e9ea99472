"""Images that end before their last pixel are refused, and whole ones that look like it are not."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from model.media import MediaError, MediaLimits, load_image

LIMITS = MediaLimits()
END_OF_IMAGE = b"\xff\xd9"
MODES = ["RGB", "L", "CMYK"]
FORMS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "full colour": {"subsampling": 0},
}


def picture(width: int = 64, height: int = 48) -> Image.Image:
    """Return noise that is neutral grey, as libjpeg's filling, in its lower half."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[height // 2 :] = 128
    return Image.fromarray(pixels)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def scan_start(data: bytes) -> int:
    """Return where the compressed pixels begin: after the header of the first scan, which begins with its length."""
    start = data.index(b"\xff\xda") + 2
    return start + int.from_bytes(data[start : start + 2], "big")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kept", [0, 1, 200])
def test_a_jpeg_that_ends_after_its_header_or_a_few_blocks_is_refused(form: str, mode: str, kept: int) -> None:
    data = jpeg(picture(256, 256).convert(mode), **FORMS[form])
    cut = data[: scan_start(data) + kept] + END_OF_IMAGE
    with pytest.raises(MediaError, match="image cannot be decoded: its data end early"):
        load_image(cut, LIMITS)


def test_a_large_jpeg_without_data_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(image: Image.Image) -> None:
        raise AssertionError("decoded")

    data = jpeg(Image.new("RGB", (600, 600)))
    monkeypatch.setattr(JpegImageFile, "load", load)
    with pytest.raises(MediaError, match="image cannot be decoded: its data end early"):
        load_image(data[: scan_start(data)] + END_OF_IMAGE, LIMITS)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("mode", MODES)
def test_a_large_jpeg_of_one_colour_is_accepted(mode: str, options: dict[str, Any]) -> None:
    for colour in (0, 127, 128, 255):
        image = Image.new("L", (1000, 900), colour).convert(mode)
        assert load_image(jpeg(image, quality=10, **options), LIMITS).size == (1000, 900)


@pytest.mark.parametrize("size", [(1, 1), (9, 17), (64, 48), (100, 37)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_a_whole_jpeg_that_ends_in_grey_is_accepted(form: str, mode: str, size: tuple[int, int]) -> None:
    data = jpeg(picture(*size).convert(mode), **FORMS[form])
    assert load_image(data, LIMITS).size == size
    assert load_image(data + b"more after the end", LIMITS).size == size


def test_a_jpeg_that_ffmpeg_cannot_read_is_accepted() -> None:
    data = jpeg(Image.new("CMYK", (64, 48), (127, 127, 127, 127)), subsampling=1)
    assert load_image(data, LIMITS).getpixel((63, 47)) == (127, 127, 127, 127)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(rows: int, *, depth: int, colour: int, interlaced: bool = False) -> bytes:
    """Return a PNG of 30 x 20 zeros, with the data of its first rows."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = bytes(1 + -(-30 * depth * channels // 8))
    header = struct.pack(">IIBBBBB", 30, 20, depth, colour, 0, 0, interlaced)
    stream = zlib.compress(row * rows)
    parts = [chunk(b"IHDR", header), chunk(b"PLTE", bytes(6)) if colour == 3 else b""]
    parts += [chunk(b"IDAT", stream[:5]), chunk(b"IDAT", stream[5:]), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("depth", "colour"), [(1, 0), (8, 0), (16, 0), (8, 2), (16, 2), (1, 3), (4, 3), (8, 4), (8, 6)]
)
def test_a_png_whose_stream_ends_before_its_last_row_is_refused(depth: int, colour: int) -> None:
    assert load_image(png(20, depth=depth, colour=colour), LIMITS).size == (30, 20)
    for rows in (0, 1, 19):
        with pytest.raises(MediaError, match="image cannot be decoded: its data"):
            load_image(png(rows, depth=depth, colour=colour), LIMITS)


def test_an_interlaced_png_is_accepted_if_it_is_whole() -> None:
    # its seven passes have more rows than the image
    assert load_image(png(100, depth=8, colour=2, interlaced=True), LIMITS).size == (30, 20)
    with pytest.raises(MediaError, match="image cannot be decoded"):
        load_image(png(2, depth=8, colour=2, interlaced=True), LIMITS)
