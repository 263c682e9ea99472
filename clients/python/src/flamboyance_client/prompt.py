"""A prompt is a string or a list of parts: text, images and videos in the order in which the model sees them.

Parts are plain dictionaries, in the form in which they are sent. A string in the list is a text part; a list of numbers is
a text-only prompt as token ids. Media are a path, bytes, a PIL image or an array of pixels, and are sent inside the
request; a URL is sent unchanged.
"""

from __future__ import annotations

import base64
import io
import mimetypes
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, Protocol, TypedDict, TypeGuard, TypeVar

from flamboyance_client.arrays import Array, encode_png, is_picture
from flamboyance_client.orientation import upright


class TextPart(TypedDict):
    type: Literal["text"]
    text: str


class Url(TypedDict):
    url: str


class ImagePart(TypedDict):
    type: Literal["image_url"]
    image_url: NotRequired[Url]
    uuid: NotRequired[str]


class VideoPart(TypedDict):
    type: Literal["video_url"]
    video_url: NotRequired[Url]
    uuid: NotRequired[str]


class ImageIdPart(TypedDict):
    type: Literal["image_id"]
    image_id: str


class VideoIdPart(TypedDict):
    type: Literal["video_id"]
    video_id: str


class EndOfChunkPart(TypedDict):
    type: Literal["end_of_chunk"]


Part = TextPart | ImagePart | VideoPart | ImageIdPart | VideoIdPart | EndOfChunkPart
# A list holds only numbers or no numbers. The type is one union, because type checkers infer a mixed list only from a
# single sequence type.
Prompt = str | Sequence[str | int | Part]


class PilImage(Protocol):
    """The part of `PIL.Image.Image` that the client uses, so that Pillow is not a dependency."""

    @property
    def mode(self) -> str: ...
    def save(self, fp: Any, format: str | None = None) -> None: ...
    def convert(self, mode: str) -> PilImage: ...


Item = TypeVar("Item")
Media = str | Path | bytes | bytearray | memoryview | PilImage | Array

# what holds the bytes of a file
BUFFERS = (bytes, bytearray, memoryview)
_URL_SCHEMES = ("data:", "http://", "https://")
_SIGNATURES = (
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"GIF8", "image/gif"),
    (0, b"BM", "image/bmp"),
    (0, b"II*\x00", "image/tiff"),
    (0, b"MM\x00*", "image/tiff"),
    (8, b"WEBP", "image/webp"),
    (8, b"AVI ", "video/x-msvideo"),
    (4, b"ftypavif", "image/avif"),
    (4, b"ftypavis", "image/avif"),
    (4, b"ftyphei", "image/heic"),
    (4, b"ftyphev", "image/heic-sequence"),
    (4, b"ftypmif1", "image/heif"),
    (4, b"ftypmsf1", "image/heif-sequence"),
    (4, b"ftyp", "video/mp4"),
    (0, b"\x1a\x45\xdf\xa3", "video/webm"),
)
# with another order of bytes, in which PNG cannot be written
_OTHER_16_BITS = {"I;16L", "I;16N"}
_PNG_MODES = {"1", "L", "LA", "I;16", "I;16B", "P", "RGB", "RGBA"}


def text(value: str) -> TextPart:
    return {"type": "text", "text": value}


def image(source: Media | None = None, *, uuid: str | None = None) -> ImagePart:
    """Return an image from a path, a URL, the bytes of an encoded file, a PIL image or an array of pixels.

    The last two are sent as PNG, which is lossless. A PIL image is turned upright as its EXIF orientation says. An array
    has the dtype uint8 and the shape [height, width, 3] or [height, width].
    `uuid` names the image. Without `source`, the part shows the image that was sent under this name before; the server
    answers `NotFound` if it does not have it any more. Raises `ValueError` without both, and for a video.
    """
    part: ImagePart = {"type": "image_url"}
    if source is not None:
        url = to_url(source)
        if url.startswith("data:video/"):
            raise ValueError("this is a video: pass it to video(...)")
        part["image_url"] = {"url": url}
    if uuid is not None:
        part["uuid"] = uuid
    _require(source, uuid)
    return part


def video(source: str | Path | bytes | None = None, *, uuid: str | None = None) -> VideoPart:
    """Return a video from a path, a URL or the bytes of an encoded file; `uuid` as for an image."""
    part: VideoPart = {"type": "video_url"}
    if source is not None:
        part["video_url"] = {"url": to_url(source)}
    if uuid is not None:
        part["uuid"] = uuid
    _require(source, uuid)
    return part


def _require(source: Media | None, uuid: str | None) -> None:
    if source is None and uuid is None:
        raise ValueError("give a source, the uuid of a media item that was sent before, or both")


def end_of_chunk() -> EndOfChunkPart:
    """Return the marker that ends the text of one media item. Families without this marker reject it."""
    return {"type": "end_of_chunk"}


def shot(media: Media | ImagePart | VideoPart, answer: str, *, end: bool = True) -> list[Part]:
    """Return the parts of one worked example: an image or `video(...)`, its text, and the end of its chunk."""
    part = media if isinstance(media, dict) else image(media)
    return [part, text(answer), *([end_of_chunk()] if end else [])]


def to_wire(prompt: Prompt) -> str | list[Part | int]:
    if isinstance(prompt, str):
        return checked_text(prompt)
    parts = checked_list(prompt, 'a prompt is a text, token ids or a list of parts, such as [image(...), "This is a"]')
    return [text(checked_text(part)) if isinstance(part, str) else part for part in parts]


def checked_list(items: Iterable[Item], expected: str) -> list[Item]:
    """Return the items as a list.

    Raises `TypeError`, whose message begins with what is expected, for one item: its own elements would count as items.
    """
    single = isinstance(items, str | bytes | bytearray | memoryview | Path | Mapping) or is_pil(items)
    if single or (is_array(items) and is_picture(items)):
        raise TypeError(f"{expected}, not one {type(items).__name__}")
    return list(items)


def checked_text(value: str) -> str:
    """Return a text. Raises `ValueError` for the name of an image or a video: the model would read the name."""
    kind = _named_type(value)
    if kind.startswith(("image/", "video/")) and (len(value.split()) == 1 or os.path.exists(value)):
        show = kind.partition("/")[0]
        raise ValueError(f"{value!r} is the name of a file: {show}({value!r}) shows the file, text({value!r}) its name")
    return value


def _named_type(value: str) -> str:
    """Return the media type that a path or a URL shows. Of other URLs than `data:` only the name of the file counts."""
    if value.startswith("data:"):
        return value.removeprefix("data:").partition(",")[0].partition(";")[0]
    # the rest may be no URL, and then guess_type raises an error
    return mimetypes.guess_type(value.rpartition("/")[2])[0] or ""


def is_url(source: Media) -> TypeGuard[str]:
    return isinstance(source, str) and source.startswith(_URL_SCHEMES)


def to_url(source: Media) -> str:
    """Return a media item as a data URL, and a URL unchanged."""
    if is_url(source):
        return source
    data, content_type = encode_media(source)
    return f"data:{content_type};base64,{base64.b64encode(data).decode('ascii')}"


def encode_media(source: Media) -> tuple[bytes, str]:
    """Return the bytes of a media item and their media type.

    The type comes from the signature of the bytes, or else from the file's name. Raises `ValueError` for empty media, for
    an array that is not an image and for a PIL image of mode I or F, and `TypeError` for an object of another type.
    """
    data, guess = _read(source)
    if not data:
        raise ValueError("the media is empty: 0 bytes")
    return data, media_type(data) or guess or "application/octet-stream"


def media_type(data: bytes) -> str | None:
    """Return the media type that the first bytes of a file show, or None for an unknown format."""
    return next((kind for offset, sign, kind in _SIGNATURES if data[offset : offset + len(sign)] == sign), None)


def _read(source: Media) -> tuple[bytes, str | None]:
    """Return the bytes of a file, and the media type that the file's name shows."""
    if isinstance(source, str | Path):
        path = Path(source)
        data, guess = path.read_bytes(), mimetypes.guess_type(path.name)[0]
        if guess is not None and not guess.startswith(("image/", "video/")) and media_type(data) is None:
            raise ValueError(f"{path} is not an image or a video")
        return data, guess
    if isinstance(source, BUFFERS):
        return bytes(source), None
    if is_array(source):
        return encode_png(source), None
    if is_pil(source):
        return _png(source), None
    kinds = "a path, a URL, bytes, a PIL image or an array of pixels"
    raise TypeError(f"an image or video must be {kinds}, not {type(source).__name__}")


def is_array(source: object) -> TypeGuard[Array]:
    return all(hasattr(source, name) for name in ("shape", "dtype", "tobytes"))


def is_pil(source: object) -> TypeGuard[PilImage]:
    return all(hasattr(source, name) for name in ("mode", "save", "convert", "getexif"))


def _png(image: PilImage) -> bytes:
    if image.mode in ("I", "F"):
        raise ValueError(f"a PIL image of mode {image.mode} has no defined white: convert it to L, I;16 or RGB first")
    stream, image = io.BytesIO(), upright(image)
    if image.mode in _OTHER_16_BITS:
        image = image.convert("I").convert("I;16")
    (image if image.mode in _PNG_MODES else image.convert("RGB")).save(stream, format="PNG")
    return stream.getvalue()
