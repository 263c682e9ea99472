"""Bytes to frames: what a user sent becomes PIL pictures, and a picture the square that a vision encoder reads.

Nothing here trusts its input: the first bytes tell the format, never a name, and the header gives the size before any
pixel is decoded. How a picture is cut and scaled is part of a family's numerics, so `resize` keeps each one's order.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.config import VisionConfig

# the first bytes of a file -> PIL's name of the format
IMAGE_MAGIC = ((b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF"))
# FFmpeg's name of a format -> its media type
VIDEO_TYPES = {"mp4": "video/mp4", "matroska": "video/x-matroska", "webm": "video/webm"}
# how far into a Matroska file its kind stands at most
EBML_HEAD_BYTES = 64
# Matroska's element of all media data
SEGMENT_ID = 0x18538067
# what PIL's decoders raise, one or the other, when a file is broken
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    RuntimeError,
    struct.error,
)
WHITE = (255, 255, 255, 255)


class MediaError(ValueError):
    """Bytes that cannot be this kind of media, or are more than the limits allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaLimits:
    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000
    # a strip one pixel high grows a lot when its shortest side is scaled to the encoder's square
    max_aspect: float = 100.0
    max_frames: int = 64
    max_seconds: float = 120.0
    # frames taken from a second of video
    frames_per_second: float = 1.0


def media_type_of(data: bytes) -> str:
    """image/... or video/... by the first bytes alone. Raises `MediaError` for what is no format that is read here."""
    try:
        return f"image/{_image_format(data).lower()}"
    except MediaError:
        pass
    try:
        form = _video_format(data)
    except MediaError:
        raise MediaError("bytes are none of JPEG, PNG, WebP, GIF, MP4, WebM, Matroska") from None
    return VIDEO_TYPES["webm" if form == "matroska" and b"webm" in data[:EBML_HEAD_BYTES] else form]


def load_image(data: bytes, limits: MediaLimits) -> Image.Image:
    """The first frame, decoded, in the file's own mode: `resize` knows when its family converts to RGB. Orientation
    tags are not applied, as none of the families did."""
    _check_bytes(data, limits)
    try:
        image = Image.open(io.BytesIO(data), formats=[_image_format(data)])
        _check_size(image.size, limits)
        image.load()
    except MediaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(f"image has too many pixels: {error}") from None
    except DECODER_ERRORS as error:
        raise MediaError(f"image cannot be decoded: {error}") from None
    return image


def _image_format(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    for magic, name in IMAGE_MAGIC:
        if data.startswith(magic):
            return name
    raise MediaError("bytes are none of JPEG, PNG, WebP, GIF")


def _check_bytes(data: bytes, limits: MediaLimits) -> None:
    if len(data) > limits.max_bytes:
        raise MediaError(f"media has {len(data)} bytes, the limit is {limits.max_bytes}")


def _check_size(size: tuple[int, int], limits: MediaLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(f"frame of {width} x {height} is empty")
    if max(size) > limits.max_aspect * min(size):
        raise MediaError(f"frame of {width} x {height} is narrower than 1 to {limits.max_aspect:g}, the limit")
    if width * height > limits.max_pixels:
        raise MediaError(f"frame of {width} x {height} has {width * height} pixels, the limit is {limits.max_pixels}")


def load_video(data: bytes, limits: MediaLimits) -> Iterator[Image.Image]:
    """RGB frames at `frames_per_second`: the first of the file, then of each next period the first to begin in it. They
    come one at a time, as a minute of them is large. A video over a limit is an error at the frame that is too many, it
    is not cut to fit."""
    _check_bytes(data, limits)
    form = _video_format(data)
    if ends_early(data, form):
        raise MediaError("video cannot be decoded: its end is missing")
    try:
        # an explicit demuxer, so that no file can be a playlist of other files
        with av.open(io.BytesIO(data), mode="r", format=form) as container:
            yield from _sampled_frames(container, limits)
    except av.FFmpegError as error:
        raise MediaError(f"video cannot be decoded: {error}") from None


def _video_format(data: bytes) -> str:
    if data[4:8] == b"ftyp":
        return "mp4"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    raise MediaError("bytes are none of MP4, WebM, Matroska")


def ends_early(data: bytes, form: str) -> bool:
    """`form`: mp4 or matroska. True only where bytes are known to be missing."""
    return _boxes_end(data) > len(data) if form == "mp4" else _segment_end(data) > len(data)


def _boxes_end(data: bytes) -> int:
    """Where the last of the file's boxes ends: each begins with its size, which counts itself."""
    place = 0
    while place + 8 <= len(data):
        size, head = int.from_bytes(data[place : place + 4], "big"), 8
        if size == 1:
            size, head = int.from_bytes(data[place + 8 : place + 16], "big"), 16
        if size < head:  # 0: up to the end, whatever that is; else no box
            return len(data)
        place += size
    return place


def _segment_end(data: bytes) -> int:
    """Where the segment ends, the second element of the file, which holds all the rest."""
    _, place = _number(data, 0, keeps_marker=True)
    size, place = _number(data, place)
    name, place = _number(data, place + size, keeps_marker=True)
    start = place
    size, place = _number(data, place)
    is_open = size + 1 == 1 << 7 * (place - start)  # all ones: written while its end was not known
    return place + size if name == SEGMENT_ID and not is_open else len(data)


def _number(data: bytes, place: int, *, keeps_marker: bool = False) -> tuple[int, int]:
    """EBML's number at a place and where it ends: the zeros in front of its first one tell its length in bytes."""
    first = data[place] if place < len(data) else 0
    length = 9 - first.bit_length()
    value = int.from_bytes(data[place : place + length], "big")
    return value if keeps_marker else value & ((1 << 7 * length) - 1), place + length


def _sampled_frames(container: av.container.InputContainer, limits: MediaLimits) -> Iterator[Image.Image]:
    if not container.streams.video:
        raise MediaError("file has no video in it")
    stream = container.streams.video[0]
    _check_size((stream.width, stream.height), limits)
    period = 1 / Fraction(limits.frames_per_second)
    start, taken, due = None, 0, Fraction(0)
    for frame in container.decode(stream):
        _check_size((frame.width, frame.height), limits)
        time = _time(frame)
        start = time if start is None else start
        seconds = time - start
        if seconds > limits.max_seconds:
            raise MediaError(
                f"video is longer than {float(seconds):.1f} seconds, the limit is {limits.max_seconds:.1f}"
            )
        if seconds < due:
            continue
        if taken == limits.max_frames:
            raise MediaError(f"video has more than {taken} frames at {limits.frames_per_second} a second, the limit")
        yield Image.fromarray(frame.to_ndarray(format="rgb24"))
        # after a gap the next is due in the next period, not once for each that was missed
        taken, due = taken + 1, (seconds // period + 1) * period
    if not taken:
        raise MediaError("video has no frames")


def _time(frame: av.VideoFrame) -> Fraction:
    """Seconds, exact: rounded ones would push a frame that begins with its period into the one before."""
    if frame.pts is None or frame.time_base is None:
        return Fraction(0)
    return frame.pts * frame.time_base


def resize(image: Image.Image, config: VisionConfig) -> NDArray[np.uint8]:  # -> [h, w, 3]
    """The encoder's square, by the rule of the family."""
    size = config.image_size
    if config.resize == "crop":
        square = _crop(image, size)
    elif config.resize == "squash":
        square = _on_white(image).resize((size, size), Image.Resampling.BICUBIC)
    else:
        square = _pad(_on_white(image), size, config.mean)
    return np.asarray(square, dtype=np.uint8)


def _crop(image: Image.Image, size: int) -> Image.Image:
    """Shortest side to `size`, the centre, and only then RGB: palettes and alpha are scaled as they are."""
    width, height = image.size
    short = min(width, height)
    scaled = image.resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    left, top = round((scaled.width - size) / 2), round((scaled.height - size) / 2)
    square = scaled.crop((left, top, left + size, top + size))
    square.info.pop("transparency", None)  # it goes unused in RGB, and PIL warns of that
    return square.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    background = Image.new("RGBA", image.size, WHITE)
    return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")


def _pad(image: Image.Image, size: int, mean: tuple[float, float, float]) -> Image.Image:
    """Longest side to `size`; what is left of the square has the mean colour, which is zero once normalised."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    red, green, blue = (round(255 * channel) for channel in mean)
    square = Image.new("RGB", (size, size), (red, green, blue))
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2))
    return square
