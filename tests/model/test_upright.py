"""Photographs are turned as their orientation says, in every format that states one, and a broken one is no error."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.media import MediaLimits, load_image

LIMITS = MediaLimits()
ORIENTATION = 0x0112
T = Image.Transpose
# an orientation -> what a camera stores for it: the picture before a viewer turns it upright
STORED = {
    2: T.FLIP_LEFT_RIGHT,
    3: T.ROTATE_180,
    4: T.FLIP_TOP_BOTTOM,
    5: T.TRANSPOSE,
    6: T.ROTATE_90,
    7: T.TRANSVERSE,
    8: T.ROTATE_270,
}
FORMS = ["JPEG", "PNG", "WEBP"]


def picture() -> Image.Image:
    """Return 32 x 16 pixels of four colours, on which every turn and reflection shows."""
    corners = Image.new("RGB", (2, 2))
    corners.putdata([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)])
    return corners.resize((32, 16), Image.Resampling.NEAREST)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    exact = {"quality": 100, "subsampling": 0} if form == "JPEG" else {"lossless": True}
    image.save(buffer, form, **exact, **options)
    return buffer.getvalue()


def with_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif


def difference(first: Image.Image, second: Image.Image) -> float:
    assert first.size == second.size
    return float(np.abs(np.asarray(first.convert("RGB"), int) - np.asarray(second.convert("RGB"), int)).mean())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orientation", STORED)
def test_a_photograph_is_turned_upright(form: str, orientation: int) -> None:
    stored = picture().transpose(STORED[orientation])
    image = load_image(encoded(stored, form, exif=with_orientation(orientation)), LIMITS)
    assert image.size == (32, 16)
    assert difference(image, picture()) < 5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orientation", [0, 1, 9, 65535])
def test_other_values_turn_nothing(form: str, orientation: int) -> None:
    image = load_image(encoded(picture(), form, exif=with_orientation(orientation)), LIMITS)
    assert difference(image, picture()) < 5


BROKEN = [
    b"",
    b"no table at all",
    b"MM\0*",
    b"II*\0\xff\xff\xff\xff",
    b"MM\0*\0\0\0\x08\xff\xff",
    # the orientation as a text, as a fraction by zero, and at an offset beyond the file
    b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04sid\0\0\0\0\0",
    b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x05\0\0\0\x01\0\0\0\x1a\0\0\0\0\0\0\0\x06\0\0\0\0",
    b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\xff\xff\xff\x7f\xff\xff\xff\0\0\0\0",
    # a table that contains itself
    b"MM\0*\0\0\0\x08\0\x01\x87\x69\0\x04\0\0\0\x01\0\0\0\x08\0\0\0\x08",
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, of the faults
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("table", BROKEN, ids=range(len(BROKEN)))
def test_an_orientation_that_cannot_be_read_turns_nothing(form: str, table: bytes) -> None:
    image = load_image(encoded(picture(), form, exif=b"Exif\0\0" + table), LIMITS)
    assert difference(image, picture()) < 5


def test_the_palette_and_its_transparency_are_kept() -> None:
    clear = picture().quantize(4)
    stored = encoded(clear.transpose(T.ROTATE_90), "PNG", transparency=0, exif=with_orientation(6))
    image = load_image(stored, LIMITS)
    assert (image.mode, image.info["transparency"]) == ("P", 0)
    assert difference(image, clear) == 0
