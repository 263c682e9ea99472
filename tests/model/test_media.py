"""Decoding under limits, and each family's resizing against the preprocessing of torchvision and transformers."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

import av
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageSequence
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor
from torchvision.transforms import Resize as TorchvisionResize
from transformers.models.idefics.image_processing_idefics import IdeficsImageProcessor
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from model.config import Resize, VisionConfig
from model.media import MediaError, MediaLimits, load_image, load_video, media_type_of, resize

LIMITS = MediaLimits()
MEAN = (0.25, 0.5, 0.75)


def vision(rule: Resize, size: int = 64) -> VisionConfig:
    return VisionConfig(
        architecture="tf_efficientnet_lite0",
        image_size=size,
        feature_dim=1280,
        num_patches=4,
        mean=MEAN,
        std=(1.0, 1.0, 1.0),
        resize=rule,
    )


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Return noise and a gradient, on which an offset of one pixel or another filter shows."""
    random = np.random.default_rng(width * 1000 + height)
    values = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
    values[..., 0] = np.linspace(0, 255, width, dtype=np.uint8)
    image = Image.fromarray(values, "RGBA" if mode in ("RGBA", "LA") else None)
    return image.convert("RGB").quantize(32) if mode == "P" else image.convert(mode)


def transparent_palette(width: int, height: int) -> Image.Image:
    """Return an image with a palette whose entries have an opacity each, as in PNG's tRNS chunk."""
    image = noise(width, height, "P")
    return decoded(encoded(image, "PNG", transparency=bytes(range(0, 256, 8))))


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> Image.Image:
    return load_image(data, LIMITS)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_images_decode_as_in_pil(form: str) -> None:
    data = encoded(noise(31, 17), form)
    image, expected = decoded(data), Image.open(io.BytesIO(data))
    assert (image.mode, image.size) == (expected.mode, (31, 17))
    assert np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_an_animation_decodes_to_its_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
    assert sum(1 for _ in ImageSequence.Iterator(Image.open(io.BytesIO(data)))) == 3
    assert decoded(data).convert("RGB").getpixel((8, 8)) == (255, 0, 0)


@pytest.mark.parametrize("form", ["PPM", "ICO", "TGA"])
def test_other_formats_of_pil_are_refused(form: str) -> None:
    with pytest.raises(MediaError, match="not one of JPEG, PNG, WebP, GIF"):
        decoded(encoded(noise(16, 16), form))


@pytest.mark.parametrize("data", [b"RIFF", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF"])
def test_bytes_that_are_not_an_image_are_refused(data: bytes) -> None:
    with pytest.raises(MediaError, match="not one of JPEG, PNG, WebP, GIF"):
        decoded(data)


@pytest.mark.parametrize("read", [decoded, media_type_of, lambda data: frames_of(data, LIMITS)])
def test_an_empty_file_is_refused_as_empty(read: Callable[[bytes], object]) -> None:
    with pytest.raises(MediaError, match=r"^the file is empty$"):
        read(b"")


def test_an_image_beyond_the_limit_of_pil_is_refused_with_its_pixels() -> None:
    header = b"BM" + struct.pack("<IIIIiiHHI", 54, 0, 54, 40, 16384, 16384, 1, 24, 0) + bytes(20)
    with pytest.raises(MediaError, match=f"image has {16384 * 16384} pixels, the limit is {LIMITS.max_pixels}"):
        decoded(header)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_file_that_ends_early_is_an_error(form: str, kept: float) -> None:
    data = encoded(noise(60, 60), form)
    with pytest.raises(MediaError, match="cannot be decoded"):
        decoded(data[: int(kept * len(data))])


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that states a size and has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, b"IDAT", b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_the_header_is_checked_before_pixels_are_decoded() -> None:
    with pytest.raises(MediaError, match="cannot be decoded"):
        decoded(png_header(100, 100))
    with pytest.raises(MediaError, match=r"8001 x 8000 has 64008000 pixels, the limit is 64000000"):
        decoded(png_header(8001, 8000))


@pytest.mark.parametrize("side", [10_000, 20_000])  # PIL warns of the first and refuses the second by itself
def test_decompression_bombs_raise_media_errors(side: int) -> None:
    with pytest.raises(MediaError, match="pixels"):
        decoded(png_header(side, side))


def test_limits_name_both_numbers() -> None:
    data = encoded(noise(40, 20), "PNG")
    with pytest.raises(MediaError, match=f"has {len(data)} bytes, the limit is 100"):
        load_image(data, MediaLimits(max_bytes=100))
    with pytest.raises(MediaError, match="40 x 20 has 800 pixels, the limit is 799"):
        load_image(data, MediaLimits(max_pixels=799))
    with pytest.raises(MediaError, match=r"40 x 20 is narrower than 1 to 1\.5, the limit"):
        load_image(data, MediaLimits(max_aspect=1.5))
    assert load_image(data, MediaLimits(max_bytes=len(data), max_pixels=800, max_aspect=2)).size == (40, 20)


@settings(deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]), st.data())
def test_damaged_files_raise_nothing_but_media_errors(form: str, data: st.DataObject) -> None:
    damaged = bytearray(encoded(noise(24, 24), form))
    changes = st.tuples(st.integers(12, len(damaged) - 1), st.integers(0, 255))
    for offset, value in data.draw(st.lists(changes, min_size=1, max_size=8)):
        damaged[offset] = value
    try:
        image = load_image(bytes(damaged), MediaLimits(max_pixels=10_000))
    except MediaError:
        return
    except UserWarning:  # PIL tells of a fault that it can live with; here warnings are errors
        return
    assert image.width * image.height <= 10_000


@settings(deadline=None)
@given(st.binary(max_size=64))
@example(b"\xff\xd8\xff")
@example(b"\x89PNG\r\n\x1a\n")
@example(b"RIFF\x00\x00\x00\x00WEBPVP8X")
def test_any_bytes_are_media_or_an_error(data: bytes) -> None:
    with pytest.raises(MediaError):
        load_image(data, LIMITS)
    with pytest.raises(MediaError):
        frames_of(data, LIMITS)


IMAGES = {
    "wide": noise(150, 70),
    "tall": noise(63, 201),
    "square": noise(64, 64),
    "small": noise(20, 33),
    # what is cut off is odd, and half of it rounds to the even side
    "odd-wide": noise(67, 64),
    "odd-tall": noise(64, 71),
    "grey": noise(90, 75, "L"),
    "grey-alpha": noise(90, 75, "LA"),
    "alpha": noise(90, 75, "RGBA"),
    "palette": noise(90, 75, "P"),
    "palette-alpha": transparent_palette(90, 75),
    "print": noise(90, 75, "CMYK"),
    "bilevel": noise(90, 75, "1"),
}


def torchvision_crop(image: Image.Image, size: int) -> NDArray[Any]:
    """Transform an image as open_clip does before version 2.23, where RGB comes last."""
    transform = Compose(
        [
            TorchvisionResize(size, InterpolationMode.BICUBIC),
            CenterCrop(size),
            lambda scaled: scaled.convert("RGB"),
            PILToTensor(),
        ]
    )
    result: torch.Tensor = transform(image)
    return result.permute(1, 2, 0).numpy()


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # PIL's, of the plain conversion in the oracle
@pytest.mark.parametrize("size", [64, 51])
@pytest.mark.parametrize("name", IMAGES)
def test_crop_equals_open_clip(name: str, size: int) -> None:
    assert np.array_equal(resize(IMAGES[name], vision("crop", size)), torchvision_crop(IMAGES[name], size))


def test_cropping_a_transparent_palette_gives_no_warning() -> None:
    assert resize(IMAGES["palette-alpha"], vision("crop")).shape == (64, 64, 3)


def idefics(image: Image.Image, processor: Any) -> NDArray[Any]:
    values = processor(image_size=64, do_rescale=False, do_normalize=False)(image, return_tensors="np")
    return np.asarray(values[0]).transpose(1, 2, 0)


@pytest.mark.parametrize("name", IMAGES)
def test_squash_equals_idefics(name: str) -> None:
    assert np.array_equal(resize(IMAGES[name], vision("squash")), idefics(IMAGES[name], IdeficsImageProcessorPil))


@pytest.mark.parametrize("size", [(640, 480), (63, 201), (100, 300), (30, 40)])
def test_squash_differs_from_torchvisions_filter_by_rounding(size: tuple[int, int]) -> None:
    """Compare with the processor that transformers takes by default.

    Its filter clips between two passes, which shows on noise and not on smooth images.
    """
    picture = noise(12, 9).resize(size, Image.Resampling.BILINEAR)
    actual, expected = resize(picture, vision("squash")), idefics(picture, IdeficsImageProcessor)
    assert np.abs(actual.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("size", "box"), [((100, 50), (0, 16, 64, 48)), ((50, 100), (16, 0, 48, 64)), ((30, 30), (0, 0, 64, 64))]
)
def test_pad_keeps_the_aspect_in_the_mean_colour(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    image = noise(*size)
    square = Image.fromarray(resize(image, vision("pad")))
    inner = image.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(square.crop(box)), np.asarray(inner))
    outside = np.ones((64, 64), dtype=bool)
    outside[box[1] : box[3], box[0] : box[2]] = False
    assert (np.asarray(square)[outside] == [64, 128, 191]).all()


@pytest.mark.parametrize("rule", ["squash", "pad"])
def test_transparency_becomes_white(rule: Literal["squash", "pad"]) -> None:
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert (resize(clear, vision(rule)) == 255).all()


def frames_of(data: bytes, limits: MediaLimits) -> list[Image.Image]:
    return list(load_video(data, limits))


def video(shades: list[int], *, form: str = "mp4", codec: str = "mpeg4", rate: int = 4, first_second: int = 0) -> bytes:
    """Return a video with a grey frame of 64 x 48 per shade, `rate` frames per second."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format=form) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i, shade in enumerate(shades):
            picture = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (shade,) * 3))
            picture.pts, picture.time_base = first_second * rate + i, Fraction(1, rate)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(("form", "codec"), [("mp4", "mpeg4"), ("webm", "libvpx")])
def test_a_video_gives_a_frame_per_second(form: str, codec: str) -> None:
    shades = [20 * (i // 4) for i in range(42)]  # a new shade each second, ten and a half of them
    frames = frames_of(video(shades, form=form, codec=codec), LIMITS)
    assert [frame.size for frame in frames] == [(64, 48)] * 11
    assert all(abs(np.asarray(frame).mean() - 20 * i) < 4 for i, frame in enumerate(frames))


def test_frame_rates_above_and_below_the_sampling_rate() -> None:
    shades = [10 * i for i in range(8)]
    everything = frames_of(video(shades, rate=2), MediaLimits(frames_per_second=2.0))
    assert [round(np.asarray(frame).mean() / 10) for frame in everything] == list(range(8))
    # there are no more frames than in the file
    assert len(frames_of(video(shades, rate=2), MediaLimits(frames_per_second=30.0))) == 8


def test_time_starts_at_the_first_frame() -> None:
    shades = [20 * (i // 4) for i in range(16)]
    frames = frames_of(video(shades, form="webm", codec="libvpx", first_second=100), MediaLimits(max_seconds=5.0))
    assert [round(np.asarray(frame).mean() / 20) for frame in frames] == [0, 1, 2, 3]


def test_limits_of_a_video_name_both_numbers() -> None:
    data = video([0] * 24)  # six seconds
    with pytest.raises(MediaError, match=r"longer than 3\.2 seconds, the limit is 3\.0"):
        frames_of(data, MediaLimits(max_seconds=3.0))
    with pytest.raises(MediaError, match=r"more than 5 frames at 1\.0 per second, the limit"):
        frames_of(data, MediaLimits(max_frames=5))
    with pytest.raises(MediaError, match="64 x 48 has 3072 pixels, the limit is 3000"):
        frames_of(data, MediaLimits(max_pixels=3000))
    with pytest.raises(MediaError, match=f"has {len(data)} bytes, the limit is 50"):
        frames_of(data, MediaLimits(max_bytes=50))
    assert len(frames_of(data, MediaLimits(max_frames=6))) == 6


def test_a_video_that_ends_early_is_an_error() -> None:
    data = video(list(range(24)))
    with pytest.raises(MediaError, match="video cannot be decoded: its end is missing"):
        frames_of(data[: len(data) // 2], LIMITS)


def test_the_media_type_comes_from_the_first_bytes() -> None:
    assert media_type_of(encoded(Image.new("RGB", (2, 2)), "PNG")) == "image/png"
    assert media_type_of(encoded(Image.new("RGB", (2, 2)), "JPEG")) == "image/jpeg"
    assert media_type_of(encoded(Image.new("RGB", (2, 2)), "WEBP")) == "image/webp"
    assert media_type_of(encoded(Image.new("RGB", (2, 2)), "GIF")) == "image/gif"
    assert media_type_of(video([0])) == "video/mp4"
    assert media_type_of(video([0], form="webm", codec="libvpx")) == "video/webm"
    assert media_type_of(video([0], form="matroska")) == "video/x-matroska"
    for other in (b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<!doctype html>", b"webm", b"BM1234"):
        with pytest.raises(
            MediaError, match="not one of JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIC, MP4, WebM, Matroska"
        ):
            media_type_of(other)


@pytest.mark.parametrize("data", [b"#EXTM3U\n/etc/passwd\n", b"ffconcat version 1.0\nfile /etc/passwd\n"])
def test_playlists_are_refused(data: bytes) -> None:
    with pytest.raises(MediaError, match="not one of MP4, WebM, Matroska"):
        frames_of(data, LIMITS)


def test_audio_alone_is_refused() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match="file has no video stream"):
        frames_of(buffer.getvalue(), LIMITS)


def test_frames_are_decoded_lazily() -> None:
    frames = load_video(video([0] * 24), MediaLimits(max_frames=2))
    assert [next(frames).size, next(frames).size] == [(64, 48)] * 2
    with pytest.raises(MediaError, match="more than 2 frames"):
        next(frames)
