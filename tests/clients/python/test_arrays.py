"""Tests that arrays of pixels become PNG files with the same pixels, and that other arrays are refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flamboyance_client import image, query
from flamboyance_client.arrays import encode_png
from flamboyance_client.prompt import encode_media

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7), (1, 1, 3), (1, 300)], ids=str)
def test_the_pixels_of_the_file_are_those_of_the_array(shape: tuple[int, ...]) -> None:
    pixels = RANDOM.integers(0, 256, shape, dtype=np.uint8)
    decoded = Image.open(io.BytesIO(encode_png(pixels)))
    assert decoded.mode == ("RGB" if len(shape) == 3 else "L")
    assert np.array_equal(np.asarray(decoded), pixels)


def test_a_view_that_is_not_contiguous_is_sent_as_it_looks() -> None:
    pixels = RANDOM.integers(0, 256, (6, 8, 3), dtype=np.uint8)[::-1, ::2]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(pixels)))), pixels)


@pytest.mark.parametrize(
    ("array", "name"),
    [
        (np.zeros((2, 3, 3), np.float32), "dtype float32 and shape [2, 3, 3]"),
        (np.zeros((3, 4, 5), np.uint8), "dtype uint8 and shape [3, 4, 5]"),
        (np.zeros((1, 4, 4, 3), np.uint8), "shape [1, 4, 4, 3]"),
        (np.zeros((4, 4, 4), np.uint8), "shape [4, 4, 4]"),
        (np.zeros((0, 4, 3), np.uint8), "shape [0, 4, 3]"),
        (np.zeros((4, 4), np.bool_), "dtype bool"),
    ],
)
def test_another_array_is_refused_with_its_dtype_and_shape(array: NDArray[np.generic], name: str) -> None:
    with pytest.raises(ValueError, match=r"expected dtype uint8 and shape \[height, width, 3\] or") as caught:
        image(array)
    assert name in str(caught.value)


def test_an_array_is_media_of_a_query() -> None:
    url = str(query(np.zeros((2, 3), np.uint8))["image"])
    assert url.startswith("data:image/png;base64,")


def test_an_object_of_another_type_is_refused_by_name() -> None:
    for source, name in ((None, "NoneType"), (3.5, "float"), (io.BytesIO(b"GIF8"), "BytesIO")):
        with pytest.raises(TypeError, match=f"an array of pixels, not {name}"):
            encode_media(source)  # type: ignore[arg-type]
