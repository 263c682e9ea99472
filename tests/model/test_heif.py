"""HEIC stills are decoded like other images, or refused by a message that names the extra."""

from __future__ import annotations

import importlib.metadata
import io
from contextlib import suppress
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from model import heif
from model.media import HeifNotInstalled, MediaError, MediaLimits, PixelBudget, load_image, load_video, media_type_of
from tests.model.test_media import noise

LIMITS = MediaLimits()
TILE = 64
BRANDS = sorted(heif.HEVC_BRANDS | heif.ANY_CODEC_BRANDS)


@pytest.fixture(autouse=True)
def registered() -> None:
    heif.register()


def heic(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "HEIF", **options)
    return buffer.getvalue()


def photograph() -> Image.Image:
    """Return a picture of several tiles that is the same in no orientation."""
    grey = Image.linear_gradient("L").resize((3 * TILE, 2 * TILE))
    return Image.merge("RGB", [grey, grey.rotate(180), Image.new("L", grey.size, 90)])


def still(brand: bytes, *compatible: bytes) -> bytes:
    brands = brand + bytes(4) + b"".join(compatible)
    return (8 + len(brands)).to_bytes(4, "big") + b"ftyp" + brands + bytes(64)


@pytest.mark.parametrize("options", [{}, {"tile_size": TILE}], ids=["whole", "tiles"])
def test_a_photograph_is_read(options: dict[str, Any]) -> None:
    picture = photograph()
    data = heic(picture, quality=95, **options)
    image = load_image(data, LIMITS)
    assert (image.mode, image.size) == ("RGB", picture.size)
    assert np.abs(np.asarray(image, int) - np.asarray(picture, int)).mean() < 4
    assert media_type_of(data) == "image/heif"
    with pytest.raises(MediaError, match="not one of MP4, WebM, Matroska"):
        list(load_video(data, LIMITS))


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_photograph_is_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = photograph().rotate({3: 180, 6: 270, 8: 90}[orientation], expand=True)
    image = load_image(heic(photograph(), quality=95, exif=exif.tobytes()), LIMITS)
    assert image.size == upright.size
    assert np.abs(np.asarray(image, int) - np.asarray(upright, int)).mean() < 5


def test_the_containers_orientation_counts_and_not_that_of_exif() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = heic(photograph(), exif=exif)  # written by pillow-heif as EXIF alone
    assert b"irot" not in data
    assert load_image(data, LIMITS).size == photograph().size


def test_the_alpha_of_a_still_is_kept() -> None:
    picture = photograph()
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    image = load_image(heic(picture, quality=95), LIMITS)
    assert image.mode == "RGBA"
    assert np.abs(np.asarray(image, int) - np.asarray(picture, int))[..., 3].mean() < 4


def test_the_primary_image_of_several_is_read() -> None:
    colours = [Image.new("RGB", (TILE, TILE), colour) for colour in ("red", "lime", "blue")]
    data = heic(colours[0], save_all=True, append_images=colours[1:], primary_index=1)
    red, green, blue = np.asarray(load_image(data, LIMITS))[8, 8]
    assert (red < 10, green > 245, blue < 10) == (True, True, True)


@pytest.mark.parametrize("options", [{}, {"tile_size": TILE}], ids=["whole", "tiles"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_a_still_that_is_cut_is_refused(options: dict[str, Any], kept: float) -> None:
    data = heic(noise(3 * TILE, 2 * TILE), **options)
    with pytest.raises(MediaError, match="cannot be decoded"):
        load_image(data[: int(kept * len(data))], LIMITS)


@pytest.mark.parametrize("position", [0.3, 0.6, 0.9])
def test_damaged_pixels_are_refused_or_decoded_and_nothing_else(position: float) -> None:
    data = bytearray(heic(noise(3 * TILE, 2 * TILE), tile_size=TILE))
    start = int(position * len(data))
    data[start : start + 200] = bytes(200)
    with suppress(MediaError):
        assert load_image(bytes(data), LIMITS).size == (3 * TILE, 2 * TILE)


def test_the_limits_hold_before_pixels_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(Image.new("RGB", (40, 20)))
    monkeypatch.setattr(pillow_heif.HeifImage, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(MediaError, match="40 x 20 has 800 pixels, the limit is 799"):
        load_image(data, MediaLimits(max_pixels=799))
    with pytest.raises(MediaError, match=r"narrower than 1 to 1\.5"):
        load_image(data, MediaLimits(max_aspect=1.5))
    with pytest.raises(MediaError, match="have 900 pixels up to this item, the limit is 899"):
        load_image(data, LIMITS, PixelBudget(limit=899, used=100))


@pytest.mark.parametrize("brand", BRANDS)
def test_without_the_extra_it_is_named(brand: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heif, "is_installed", lambda: False)
    for read in (media_type_of, lambda data: load_image(data, LIMITS)):
        with pytest.raises(HeifNotInstalled, match=r"\(the extra heif\).*send JPEG or PNG"):
            read(still(brand, b"mif1", b"heic"))
    with pytest.raises(MediaError, match="not one of MP4, WebM, Matroska"):
        list(load_video(still(brand), LIMITS))
    with pytest.raises(MediaError, match=r"not one of JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, MP4, WebM, Matroska$"):
        media_type_of(b"another format")


@pytest.mark.parametrize(
    ("version", "is_recent"), [("1.7.0", False), ("0.22", False), ("1.8.0", True), ("2.0.0rc1", True)]
)
def test_an_older_version_counts_as_missing(version: str, is_recent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heif, "version", lambda name: version)
    assert heif.is_installed.__wrapped__() == is_recent
    monkeypatch.setattr(heif, "version", importlib.metadata.version)
    monkeypatch.setattr(heif, "DISTRIBUTION", "pillow-heif-that-is-not-there")
    assert not heif.is_installed.__wrapped__()


@pytest.mark.parametrize("brand", BRANDS)
def test_a_still_without_an_image_is_refused(brand: bytes) -> None:
    with pytest.raises(MediaError, match="cannot be decoded: its header"):
        load_image(still(brand, b"mif1", b"heic"), LIMITS)


@pytest.mark.parametrize(
    ("data", "form"),
    [
        (still(b"avif", b"mif1"), "AVIF"),
        (still(b"mif1", b"avif", b"miaf"), "AVIF"),
        (still(b"mif1", b"heic", b"miaf"), "HEIF"),
        (still(b"mif1", b"avif", b"heic"), "HEIF"),
        (still(b"mif1"), "HEIF"),
        (still(b"heic", b"mif1"), "HEIF"),
        (still(b"isom", b"mif1", b"heic"), None),
        (still(b"mp42"), None),
        (b"\0\0\0\x18ftyp", None),
        (b"", None),
    ],
)
def test_the_format_comes_from_the_brands(data: bytes, form: str | None) -> None:
    assert heif.still_format(data) == form


def test_an_avif_image_of_a_generic_brand_is_read() -> None:
    """It needs no extra: Pillow itself reads AVIF."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "AVIF")
    data = buffer.getvalue()
    assert data[8:12] == b"avif"
    assert b"avif" in data[16:32]
    generic = data[:8] + b"mif1" + data[12:]
    assert media_type_of(generic) == "image/avif"
    assert load_image(generic, LIMITS).size == (16, 16)
