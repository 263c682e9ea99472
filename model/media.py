"""Decodes media bytes to PIL images, and resizes an image to the square that a vision encoder reads.

Input is not trusted: the format is read from the first bytes and never from a name, and the size from the header before any
pixel is decoded. Error messages never repeat those of a library, which may reveal contents of memory. Cropping and scaling
change a family's results, so `resize` does them in the order of each family.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, ExifTags, Image, TiffImagePlugin

from model import heif
from model.config import VisionConfig
from model.truncation import has_no_pixels, image_ends_early, lacks_strips, still_ends_early, video_ends_early

# the first bytes of a file -> PIL's name of the format
IMAGE_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
)
IMAGE_FORMATS = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF"
VIDEO_FORMATS = "MP4, WebM, Matroska"
# TIFF's photometric interpretation of grey whose highest number is white
BLACK_IS_ZERO = 1
# PIL's modes in which white is defined, and that become RGB
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B"}
# FFmpeg's name of a format -> its media type
VIDEO_TYPES = {"mp4": "video/mp4", "matroska": "video/x-matroska", "webm": "video/webm"}
# bytes within which a Matroska file names its kind
EBML_HEAD_BYTES = 64
# the errors of PIL's decoders for broken files
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    struct.error,
)
# EXIF's orientation -> the operation that turns the stored pixels upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# degrees counterclockwise -> the same for the frames of a video
TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
# version of the decoding, part of the key of stored vectors: change it with every change of the decoded pixels
DECODING = "upright-8-bits"
ENDS_EARLY = "image cannot be decoded: its data end early"
# Pillow's own reader of TIFF leaves missing strips black and ignores the lengths of strips; libtiff does not
TiffImagePlugin.READ_LIBTIFF = True
# there are several decode processes, and each thread would need a part of their memory
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
WHITE = (255, 255, 255, 255)


class MediaError(ValueError):
    """Bytes that cannot be decoded as this kind of media, or exceed the limits."""


class TooManyPixels(MediaError):
    """An item with which the media of a request have more pixels than permitted."""


class HeifNotInstalled(MediaError):
    """A HEIF still, but the library that reads it is not installed."""

    def __init__(self) -> None:
        super().__init__(heif.NOT_INSTALLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaLimits:
    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000
    # a strip one pixel high becomes very large when its shortest side is scaled to the encoder's square
    max_aspect: float = 100.0
    # over all media of one request
    max_total_pixels: int = 1_000_000_000
    max_frames: int = 64
    max_seconds: float = 120.0
    # frames sampled per second of video
    frames_per_second: float = 1.0


@dataclass(slots=True)
class PixelBudget:
    """Counts the pixels of the frames that are decoded for one request, each before it is decoded or kept."""

    limit: int
    used: int = 0

    def spend(self, size: tuple[int, int]) -> None:
        """Count a frame. Raises `TooManyPixels` if the total exceeds the limit."""
        total = self.used + size[0] * size[1]
        if total > self.limit:
            raise TooManyPixels(
                f"the media of this request have {total} pixels up to this item, the limit is {self.limit}"
            )
        self.used = total


def media_type_of(data: bytes) -> str:
    """Return image/... or video/..., from the first bytes alone. Raises `MediaError` for an unsupported format."""
    try:
        return f"image/{_image_format(data).lower()}"
    except HeifNotInstalled:
        raise
    except MediaError:
        pass
    try:
        video_format = _video_format(data)
    except MediaError:
        raise _unknown_format(data, f"{image_formats()}, {VIDEO_FORMATS}") from None
    is_webm = video_format == "matroska" and b"webm" in data[:EBML_HEAD_BYTES]
    return VIDEO_TYPES["webm" if is_webm else video_format]


def image_formats() -> str:
    """Return the names of the formats of images that can be read here."""
    return f"{IMAGE_FORMATS}, HEIC" if heif.is_installed() else IMAGE_FORMATS


def _unknown_format(data: bytes, known: str) -> MediaError:
    return MediaError(f"the format is not one of {known}" if data else "the file is empty")


def load_image(data: bytes, limits: MediaLimits, budget: PixelBudget | None = None) -> Image.Image:
    """Decode the first frame, upright, in the file's own mode of 8 bits; `resize` converts it to RGB.

    Raises `MediaError`.
    """
    _check_bytes(data, limits)
    image = _open_image(data, limits)
    (budget or PixelBudget(limits.max_total_pixels)).spend(image.size)
    if has_no_pixels(data, image.size):
        raise MediaError(ENDS_EARLY)
    try:
        if isinstance(image, TiffImagePlugin.TiffImageFile) and lacks_strips(image):
            raise EOFError
        image.load()
    except DECODER_ERRORS:
        raise MediaError("image cannot be decoded: its data are damaged, or end early") from None
    if image_ends_early(data, image):
        raise MediaError(ENDS_EARLY)
    upright = _upright(image)
    return _high_bytes(upright) if upright.mode.startswith("I;16") else upright


def _upright(image: Image.Image) -> Image.Image:
    """Turn a photograph upright by its EXIF orientation; an orientation that cannot be read is ignored."""
    try:
        method = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DECODER_ERRORS:
        return image
    return image if method is None else image.transpose(method)


def _high_bytes(image: Image.Image) -> Image.Image:
    """Reduce grey of 16 bits to 8 bits, as PIL reduces colours; pixels of the transparent grey get alpha 0."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _open_image(data: bytes, limits: MediaLimits) -> Image.Image:
    """Read the header."""
    image_format = _image_format(data)
    if image_format == heif.FORMAT:
        if still_ends_early(data):
            raise MediaError(ENDS_EARLY)
        heif.register()
    try:
        image = Image.open(io.BytesIO(data), formats=[image_format])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(f"image has {_num_pixels(error)} pixels, the limit is {limits.max_pixels}") from None
    except DECODER_ERRORS:
        message = "image cannot be decoded: its header is damaged, ends early, or has a variant that is not supported"
        raise MediaError(message) from None
    _check_size(image.size, limits)
    _check_mode(image)
    return image


def _num_pixels(bomb: Exception) -> str:
    """Return the number of pixels of an image that PIL refuses to open; only its error has it."""
    number = re.match(r"Image size \((\d+) pixels\)", str(bomb))
    return number[1] if number else "too many"


def _image_format(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if (still := heif.still_format(data)) is not None:
        if still == heif.FORMAT and not heif.is_installed():
            raise HeifNotInstalled
        return still
    if data[:2] == b"BM" and data[15:18] == b"\0\0\0":  # the high bytes of the header's length
        return "BMP"
    for magic, name in IMAGE_MAGIC:
        if data.startswith(magic):
            return name
    raise _unknown_format(data, image_formats())


def _check_mode(image: Image.Image) -> None:
    is_known = image.mode in MODES
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.mode.startswith("I;16"):
        depth, black = TiffImagePlugin.BITSPERSAMPLE, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION
        is_known = image.tag_v2.get(depth) == (16,) and image.tag_v2.get(black) == BLACK_IS_ZERO
    if not is_known:
        kind = f"pixels of the type {image.mode}, which has no defined white"
        raise MediaError(f"image has {kind}: send grey or RGB of 8 or 16 bits")


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


def load_video(data: bytes, limits: MediaLimits, budget: PixelBudget | None = None) -> Iterator[Image.Image]:
    """Yield RGB frames at `frames_per_second`: the first frame, then the first that begins in each following period.

    A video that exceeds a limit is not truncated: it raises `MediaError` at the first frame beyond the limit.
    """
    _check_bytes(data, limits)
    video_format = _video_format(data)
    if video_ends_early(data, video_format):
        raise MediaError("video cannot be decoded: its end is missing")
    try:
        # the demuxer is set, so that a file cannot be a playlist of other files; titles may have any encoding
        with av.open(io.BytesIO(data), mode="r", format=video_format, metadata_errors="replace") as container:
            yield from _sampled_frames(container, limits, budget or PixelBudget(limits.max_total_pixels))
    except av.FFmpegError:
        raise MediaError("video cannot be decoded: its data are damaged") from None


def _video_format(data: bytes) -> str:
    if data[4:8] == b"ftyp" and heif.still_format(data) is None:
        return "mp4"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    raise _unknown_format(data, VIDEO_FORMATS)


def _sampled_frames(
    container: av.container.InputContainer, limits: MediaLimits, budget: PixelBudget
) -> Iterator[Image.Image]:
    if not container.streams.video:
        raise MediaError("file has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise MediaError("video has a codec that is not supported")
    _check_size((stream.width, stream.height), limits)
    period = 1 / Fraction(limits.frames_per_second)
    start, num_frames, due = None, 0, Fraction(0)
    for frame in container.decode(stream):
        _check_size((frame.width, frame.height), limits)
        time = _time(frame, start)
        # if the first frame's time is wrong, those after it have earlier ones
        start = time if start is None else min(start, time)
        seconds = time - start
        if seconds > limits.max_seconds:
            raise MediaError(
                f"video is longer than {float(seconds):.1f} seconds, the limit is {limits.max_seconds:.1f}"
            )
        if seconds < due:
            continue
        if num_frames == limits.max_frames:
            raise MediaError(
                f"video has more than {num_frames} frames at {limits.frames_per_second} per second, the limit"
            )
        if frame.is_corrupt:
            raise MediaError("video cannot be decoded: a frame lacks data")
        budget.spend((frame.width, frame.height))
        yield _turned(Image.fromarray(frame.to_ndarray(format="rgb24")), frame.rotation)
        # after a gap, one frame is due in the next period, and none for the periods of the gap
        num_frames, due = num_frames + 1, (seconds // period + 1) * period
    if not num_frames:
        raise MediaError("video has no frames")


def _turned(picture: Image.Image, degrees: int) -> Image.Image:
    """Turn a frame counterclockwise by a multiple of 90 degrees; other angles are ignored."""
    method = TURNS.get(degrees % 360)
    return picture if method is None else picture.transpose(method)


def _time(frame: av.VideoFrame, start: Fraction | None) -> Fraction:
    """Return exact seconds; rounding would move a frame at the start of a period into the previous period.

    A frame without a time has that of the start.
    """
    if frame.pts is None or frame.time_base is None:
        return start or Fraction(0)
    return frame.pts * frame.time_base


def resize(image: Image.Image, config: VisionConfig) -> NDArray[np.uint8]:  # -> [h, w, 3]
    """Return the image as the encoder's square, by the family's rule (crop, squash or pad)."""
    size = config.image_size
    if config.resize == "crop":
        square = _crop(image, size)
    elif config.resize == "squash":
        square = _on_white(image).resize((size, size), Image.Resampling.BICUBIC)
    else:
        square = _pad(_on_white(image), size, config.mean)
    return np.asarray(square, dtype=np.uint8)


def _crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the shortest side to `size`, crop the centre, and convert to RGB last: palettes and alpha are scaled too."""
    width, height = image.size
    short = min(width, height)
    scaled = image.resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    left, top = round((scaled.width - size) / 2), round((scaled.height - size) / 2)
    square = scaled.crop((left, top, left + size, top + size))
    square.info.pop("transparency", None)  # RGB has no use for it, and PIL warns
    return square.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    background = Image.new("RGBA", image.size, WHITE)
    return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")


def _pad(image: Image.Image, size: int, mean: tuple[float, float, float]) -> Image.Image:
    """Scale the longest side to `size`; the rest of the square has the mean colour, which is zero once normalised."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    red, green, blue = (round(255 * channel) for channel in mean)
    square = Image.new("RGB", (size, size), (red, green, blue))
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2))
    return square
