"""Parses records of shards by the kind of their set: an image or clip with a text, or an interleaved document.

pairs, videos   KEY.jpg (png, webp, gif, bmp, tiff, avif, heic / mp4, mov, webm, mkv) and KEY.txt
documents       KEY.json in MMC4's format (sentences; each image with its sentence and similarity) or in OBELICS' format
                (two lists with a text or an image at each index); images in the JSON as base64, or in files KEY.0.jpg, ...
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from model.prompt import EndOfChunk, Media, Segment, Text
from training.config import SetConfig
from training.data.bad_record_log import BadRecord
from training.data.shards import RawRecord, split_name
from training.examples import Example

# HEIC (heic, heif, hif) needs the extra heif
IMAGES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"),
    *("heic", "heif", "hif"),
)
VIDEOS = ("mp4", "m4v", "mov", "webm", "mkv")


@dataclass(frozen=True, slots=True)
class Interleaved:
    """An example, and the files of its media by their digest."""

    example: Example
    files: Mapping[bytes, bytes]


def parse(record: RawRecord, config: SetConfig, rng: Random) -> Interleaved:
    if config.kind == "documents":
        return _document(record, config)
    return _pair(record, IMAGES if config.kind == "pairs" else VIDEOS, rng)


def _pair(record: RawRecord, extensions: tuple[str, ...], rng: Random) -> Interleaved:
    file = next((record.files[extension] for extension in extensions if extension in record.files), None)
    if file is None:
        raise BadRecord("no media", f"its files are {', '.join(sorted(record.files))}")
    text = _decode(record.files.get("txt", b"")).strip()
    if not text:
        raise BadRecord("no text")
    # half of the texts begin with a space, so that the model learns both forms (paper, appendix A.1.1)
    spaced = f" {text}" if rng.random() < 0.5 else text
    digest = hashlib.sha256(file).digest()
    segments = (Media(digest), Text(spaced), EndOfChunk())
    return Interleaved(Example(name=record.name, segments=segments), {digest: file})


def _decode(text: bytes) -> str:
    try:
        return text.decode("utf-8-sig")  # without the byte order mark that editors of Windows write
    except UnicodeDecodeError as error:
        raise BadRecord("text is not UTF-8", str(error)) from None


def _document(record: RawRecord, config: SetConfig) -> Interleaved:
    try:
        document = json.loads(record.files["json"].decode("utf-8-sig"))
    except (KeyError, ValueError, RecursionError) as error:
        raise BadRecord("no document", str(error)) from None
    if not isinstance(document, dict):
        raise BadRecord("no document", f"its JSON is a {type(document).__name__}, must be an object")
    parts = _mmc4(document, config) if "text_list" in document else _obelics(document, record)
    return _interleave(record.name, parts, config)


def _mmc4(document: dict[str, Any], config: SetConfig) -> list[str | bytes]:
    """Return each image before the sentence to which it was matched, so the media follow the sentences' order."""
    sentences = document["text_list"]
    if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
        raise BadRecord("not MMC4's format", "text_list must be a list of strings")
    before: dict[int, list[bytes]] = {i: [] for i in range(len(sentences))}
    try:
        for image in document["image_info"]:
            if image.get("image_base64") and image["matched_sim"] >= config.min_similarity:
                before[image["matched_text_index"]].append(_base64(image["image_base64"]))
    except (AttributeError, KeyError, TypeError) as error:
        raise BadRecord("not MMC4's format", repr(error)) from None
    return [part for i, sentence in enumerate(sentences) for part in (*before[i], sentence)]


def _obelics(document: dict[str, Any], record: RawRecord) -> list[str | bytes]:
    """Return texts and images in order, without the texts that follow a missing image, up to the next one.

    An image is missing if it is a URL, or null like its text.
    """
    parts: list[str | bytes] = []
    is_missing = False
    for text, image in check_lists(document):
        if text is not None:
            parts += [] if is_missing else [text]
            continue
        is_missing = image is None or is_url(image)
        if image is not None and not is_missing:
            parts.append(_file(image, record) or _base64(image))
    return parts


def _file(image: str, record: RawRecord) -> bytes | None:
    """Return a file of the record: `0.jpg` and `KEY.0.jpg` name the same one, even in a record with the key `0`."""
    key, extension = split_name(image)
    file = record.files.get(image.lower())
    return record.files.get(extension) if file is None and record.name.endswith(f"/{key}") else file


def is_url(image: str) -> bool:
    return image.lower().startswith(("http:", "https:"))


def check_lists(document: Mapping[str, Any]) -> list[tuple[str | None, str | None]]:
    """Return a document's texts and images by index. Raises BadRecord unless one of the two is null at each index."""
    texts, images = document.get("texts"), document.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise BadRecord("not OBELICS' format", "texts and images must be two lists of equal length")
    for i, (text, image) in enumerate(zip(texts, images, strict=True)):
        if not isinstance(text, str | None) or not isinstance(image, str | None):
            raise BadRecord("not OBELICS' format", f"texts[{i}] and images[{i}] must be strings or null")
        if text is not None and image is not None:
            raise BadRecord("not OBELICS' format", f"texts[{i}] and images[{i}] are both set, one must be null")
    return list(zip(texts, images, strict=True))


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecord("image is neither a file of its record nor base64", str(error)) from None


def _checked(text: str) -> str:
    """Return the text. Raises BadRecord for half of a surrogate pair, which JSON can have and a tokenizer cannot read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord("text is not Unicode", str(error)) from None
    return text


def _interleave(name: str, parts: list[str | bytes], config: SetConfig) -> Interleaved:
    """Insert an end of chunk before every image that is not the first segment, and at the document's end (paper, 3.2)."""
    segments: list[Segment] = []
    files: dict[bytes, bytes] = {}
    for part in parts:
        if isinstance(part, bytes):
            digest = hashlib.sha256(part).digest()
            files[digest] = part
            segments += [*([EndOfChunk()] if segments else []), Media(digest)]
        elif text := _checked(part).strip():
            joined = isinstance(segments[-1], Text) if segments else False
            segments.append(Text(f" {text}" if joined else text))
    num_media = sum(isinstance(segment, Media) for segment in segments)
    if num_media < max(1, config.min_media):
        raise BadRecord("too few images", f"{num_media}, the set requires {config.min_media}")
    return Interleaved(Example(name=name, segments=(*segments, EndOfChunk())), files)
