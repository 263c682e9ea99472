"""Images of more than 8 bits per channel equal their twins of 8 bits, or are refused by name."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from model.config import Resize
from model.media import MediaLimits, load_image, resize
from tests.model.test_media import vision

LIMITS = MediaLimits()
GREY: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def deep(values: NDArray[np.uint8]) -> Image.Image:
    """Return an image of 16 bits whose white is 65535."""
    return Image.fromarray(values.astype(np.uint16) * 257)


def loaded(data: bytes) -> Image.Image:
    return load_image(data, LIMITS)


def test_grey_of_16_bits_equals_its_twin_of_8() -> None:
    image, twin = loaded(encoded(deep(GREY))), loaded(encoded(Image.fromarray(GREY)))
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), np.asarray(twin))


@pytest.mark.parametrize("rule", ["crop", "squash", "pad"])
def test_grey_of_16_bits_is_not_white_for_the_encoder(rule: Resize) -> None:
    image, twin = loaded(encoded(deep(GREY))), loaded(encoded(Image.fromarray(GREY)))
    assert np.array_equal(resize(image, vision(rule)), resize(twin, vision(rule)))


def test_a_dark_picture_of_16_bits_loses_its_low_byte_as_colours_do() -> None:
    values = np.arange(600, dtype=np.uint16).reshape(20, 30)
    assert np.array_equal(np.asarray(loaded(encoded(Image.fromarray(values)))), values // 256)


def test_the_transparent_grey_of_16_bits_is_one_of_65536() -> None:
    values = np.array([[0x1234, 0x1200, 0x1234, 0xFFFF]], np.uint16)
    image = loaded(encoded(Image.fromarray(values), transparency=0x1234))
    assert np.asarray(image).tolist() == [[[0x12, 0], [0x12, 255], [0x12, 0], [0xFF, 255]]]


def test_a_turned_photograph_of_16_bits_is_both() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = loaded(encoded(deep(GREY), exif=exif))
    assert np.array_equal(np.asarray(image), np.rot90(GREY, -1))
