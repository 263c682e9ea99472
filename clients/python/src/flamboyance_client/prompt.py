"""A prompt is a string or a list of parts: text, images and videos in the order in which the model shall see them.

Parts are plain dictionaries, as they travel. A string in the list is a text part; a list of numbers is a prompt of
text alone as token ids. Media come from a path, from bytes or from a PIL image, and travel inside the request; a URL is
passed on as it is.
"""

from __future__ import annotations

import base64
import io
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict


class TextPart(TypedDict):
    type: Literal["text"]
    text: str


class Url(TypedDict):
    url: str


class ImagePart(TypedDict):
    type: Literal["image_url"]
    image_url: Url


class VideoPart(TypedDict):
    type: Literal["video_url"]
    video_url: Url


class ImageIdPart(TypedDict):
    type: Literal["image_id"]
    image_id: str


class VideoIdPart(TypedDict):
    type: Literal["video_id"]
    video_id: str


class EndOfChunkPart(TypedDict):
    type: Literal["end_of_chunk"]


Part = TextPart | ImagePart | VideoPart | ImageIdPart | VideoIdPart | EndOfChunkPart
# all numbers or none: one union, since type checkers infer a mixed list only from a single sequence type
Prompt = str | Sequence[str | int | Part]


class PilImage(Protocol):
    """What is used of `PIL.Image.Image`: Pillow itself is not needed unless you bring one."""

    @property
    def mode(self) -> str: ...
    def save(self, fp: Any, format: str | None = None) -> None: ...
    def convert(self, mode: str) -> PilImage: ...


Media = str | Path | bytes | PilImage

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
    (4, b"ftyp", "video/mp4"),
    (0, b"\x1a\x45\xdf\xa3", "video/webm"),
)
_PNG_MODES = {"1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"}


def text(value: str) -> TextPart:
    return {"type": "text", "text": value}


def image(source: Media) -> ImagePart:
    """An image from a path, a URL, an encoded file's bytes or a PIL image (sent as PNG, without loss)."""
    return {"type": "image_url", "image_url": {"url": to_url(source)}}


def video(source: str | Path | bytes) -> VideoPart:
    """A video from a path, a URL or an encoded file's bytes."""
    return {"type": "video_url", "video_url": {"url": to_url(source)}}


def end_of_chunk() -> EndOfChunkPart:
    """Ends the text that belongs to one media; a family that has no such marker refuses it by name."""
    return {"type": "end_of_chunk"}


def shot(media: Media, answer: str, *, end: bool = True) -> list[Part]:
    """One worked example: an image, the text that goes with it, and the end of its chunk."""
    return [image(media), text(answer), *([end_of_chunk()] if end else [])]


def to_wire(prompt: Prompt) -> str | list[Part | int]:
    if isinstance(prompt, str):
        return prompt
    return [text(part) if isinstance(part, str) else part for part in prompt]


def is_url(source: Media) -> bool:
    return isinstance(source, str) and source.startswith(_URL_SCHEMES)


def to_url(source: Media) -> str:
    """A media as a data URL; a URL as it is."""
    if isinstance(source, str) and source.startswith(_URL_SCHEMES):
        return source
    data, kind = encoded(source)
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def encoded(source: Media) -> tuple[bytes, str]:
    """A media's bytes and their type, which the bytes know better than the file's name."""
    guess = None
    if isinstance(source, str | Path):
        path = Path(source)
        data, guess = path.read_bytes(), mimetypes.guess_type(path.name)[0]
    else:
        data = source if isinstance(source, bytes) else _png(source)
    if not data:
        raise ValueError("the media is empty: 0 bytes")
    kind = next((kind for at, sign, kind in _SIGNATURES if data[at : at + len(sign)] == sign), guess)
    return data, kind or "application/octet-stream"


def _png(picture: PilImage) -> bytes:
    stream = io.BytesIO()
    (picture if picture.mode in _PNG_MODES else picture.convert("RGB")).save(stream, format="PNG")
    return stream.getvalue()
