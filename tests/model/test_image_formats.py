"""Every format decodes to its pixels, a cut or damaged file is refused, and so are pixels that have no defined white."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from model.media import MediaError, MediaLimits, load_image, load_video, media_type_of
from tests.model.test_media import noise

LIMITS = MediaLimits()
STRIP_OFFSETS, STRIP_BYTES, ROWS_PER_STRIP = 273, 279, 278
BITS, WHITE_IS = 258, 262
TIFF_COMPRESSIONS = ["raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg"]
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "BMP": ("BMP", {}),
    "AVIF": ("AVIF", {}),
    **{f"TIFF-{name}": ("TIFF", {"compression": name}) for name in TIFF_COMPRESSIONS},
}


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def tiff_with(data: bytes, tag: int, *, name: int | None = None, count: int | None = None, value: int = 0) -> bytes:
    """Return a little-endian TIFF whose entry of a tag has another name, count or value."""
    start = data.index(tag.to_bytes(2, "little"), int.from_bytes(data[4:8], "little"))
    entry = bytearray(data[start : start + 12])
    if name is not None:
        entry[:2] = name.to_bytes(2, "little")
    if count is not None:
        entry[4:8] = count.to_bytes(4, "little")
    else:
        entry[8:12] = value.to_bytes(4, "little")
    return data[:start] + bytes(entry) + data[start + 12 :]


@pytest.mark.parametrize("name", FILES)
def test_a_format_decodes_as_in_pil(name: str) -> None:
    form, options = FILES[name]
    data = encoded(noise(31, 17), form, **options)
    image, expected = load_image(data, LIMITS), Image.open(io.BytesIO(data))
    assert (image.mode, image.size) == (expected.mode, (31, 17))
    assert np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # PIL's, of the table that is cut
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_file_that_is_cut_is_refused(name: str, kept: float) -> None:
    form, options = FILES[name]
    data = encoded(noise(60, 60), form, **options)
    with pytest.raises(MediaError, match="cannot be decoded"):
        load_image(data[: int(kept * len(data))], LIMITS)


def table_first(data: bytes) -> bytes:
    """Return a TIFF of one strip whose table is before its pixels, as many programs write it."""
    if (start := int.from_bytes(data[4:8], "little")) == 8:
        return data
    moved = data[:4] + (8).to_bytes(4, "little") + data[start:] + data[8:start]
    return tiff_with(moved, STRIP_OFFSETS, value=8 + len(data) - start)


@pytest.mark.parametrize(
    ("mode", "compression"),
    [("L", "raw"), ("L", "tiff_lzw"), ("L", "tiff_deflate"), ("L", "packbits"), ("1", "group4")],
)
def test_a_tiff_whose_pixels_are_cut_is_not_filled(mode: str, compression: str) -> None:
    image = noise(60, 60, mode)
    data = table_first(encoded(image, "TIFF", compression=compression))
    assert np.array_equal(np.asarray(load_image(data, LIMITS)), np.asarray(image))
    with pytest.raises(MediaError, match="its data are damaged, or end early"):
        load_image(data[:-40], LIMITS)


@pytest.mark.parametrize("name", FILES)
def test_the_limit_of_pixels_holds_before_they_are_decoded(name: str) -> None:
    form, options = FILES[name]
    data = encoded(noise(40, 20), form, **options)
    with pytest.raises(MediaError, match="40 x 20 has 800 pixels, the limit is 799"):
        load_image(data, MediaLimits(max_pixels=799))


@pytest.mark.parametrize("form", ["AVIF", "TIFF"])
def test_the_first_page_or_frame_is_read(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    red, green, blue = np.asarray(load_image(data, LIMITS))[8, 8]
    assert (red > 250, green < 5, blue < 5) == (True, True, True)


@pytest.mark.parametrize("form", ["AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_pictures_of_the_new_formats_are_turned_upright(form: str, orientation: int) -> None:
    stored = Image.linear_gradient("L").resize((32, 64)).convert("RGB")
    upright = stored.rotate({3: 180, 6: 270, 8: 90}[orientation], expand=True)
    image = load_image(encoded(stored, form, exif=turned(orientation)), LIMITS)
    assert image.size == upright.size
    assert np.abs(np.asarray(image, int) - np.asarray(upright, int)).mean() < 5


@pytest.mark.parametrize("form", ["I;16", "I;16B"])
def test_a_tiff_of_16_bits_equals_its_twin_of_8(form: str) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    deep = Image.fromarray((grey.astype(np.uint16) * 257).astype(">u2" if form == "I;16B" else "<u2"))
    assert deep.mode == form
    for compression in ("raw", "tiff_lzw"):
        data = encoded(deep, "TIFF", compression=compression, exif=turned(6))
        assert np.array_equal(np.asarray(load_image(data, LIMITS)), np.rot90(grey, -1))


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_pixels_without_a_defined_white_are_refused_by_name(mode: str) -> None:
    image = Image.new(mode, (20, 20))
    with pytest.raises(MediaError, match=rf"pixels of the type {mode}, which .* 8 or 16 bits"):
        load_image(encoded(image, "TIFF"), LIMITS)


@pytest.mark.parametrize(("tag", "value"), [(BITS, 12), (WHITE_IS, 0)])
def test_grey_whose_white_is_another_number_is_refused(tag: int, value: int) -> None:
    data = encoded(Image.new("I;16", (20, 20), 7), "TIFF")
    load_image(data, LIMITS)
    with pytest.raises(MediaError, match=r"pixels of the type I;16, which .* 8 or 16 bits"):
        load_image(tiff_with(data, tag, value=value), LIMITS)


@pytest.mark.parametrize("tag", [STRIP_OFFSETS, STRIP_BYTES])
def test_a_tiff_that_lacks_strips_is_refused(tag: int) -> None:
    data = encoded(Image.new("L", (64, 64), 200), "TIFF", tiffinfo={ROWS_PER_STRIP: 8})
    assert np.asarray(load_image(data, LIMITS)).min() == 200
    with pytest.raises(MediaError, match="its data are damaged, or end early"):
        load_image(tiff_with(data, tag, count=7), LIMITS)


@pytest.mark.parametrize("form", ["PPM", "ICO", "TGA", "JPEG2000"])
def test_a_refusal_names_the_formats_that_are_read(form: str) -> None:
    with pytest.raises(MediaError, match=r"the format is not one of JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIC$"):
        load_image(encoded(noise(16, 16), form), LIMITS)


def test_an_avif_image_is_no_video() -> None:
    data = encoded(noise(16, 16), "AVIF")
    assert media_type_of(data) == "image/avif"
    with pytest.raises(MediaError, match="not one of MP4, WebM, Matroska"):
        list(load_video(data, LIMITS))


def test_the_types_of_the_formats() -> None:
    assert features.check("avif")
    assert media_type_of(encoded(noise(2, 2), "BMP")) == "image/bmp"
    assert media_type_of(encoded(noise(2, 2), "TIFF")) == "image/tiff"
    assert media_type_of(encoded(noise(2, 2), "TIFF", big_tiff=False)) == "image/tiff"
    with pytest.raises(MediaError):
        media_type_of(b"BM is how this text begins")
