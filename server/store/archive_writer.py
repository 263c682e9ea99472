"""Writes a version of a support set as an archive, in pieces, with a piece of one media item in memory."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import msgspec

from server.media.store import MediaStore
from server.schemas.archive import EXAMPLES, FORMAT, FORMAT_VERSION, MANIFEST, MEDIA_FOLDER
from server.store.records import NO_METADATA, Example, SupportSet

# bytes of examples that are compressed at once
PIECE_BYTES = 2**18
SUFFIXES = {
    "image/jpeg": ".jpg",
    "image/png": ".png",
    "image/webp": ".webp",
    "image/gif": ".gif",
    "image/bmp": ".bmp",
    "image/tiff": ".tiff",
    "image/avif": ".avif",
    "image/heif": ".heic",
    "video/mp4": ".mp4",
    "video/webm": ".webm",
    "video/x-matroska": ".mkv",
}

encode = msgspec.json.Encoder().encode


def write_archive(support_set: SupportSet, metadata: dict[str, Any], store: MediaStore) -> Iterator[bytes]:
    """Yield the archive of a version: the same version, name and metadata give the same bytes. Each step blocks.

    The media come first, because the examples contain their digests. Raises `MediaNotFound` and `StorageUnavailable`.
    """
    output = _Output()
    media: dict[str, dict[str, str]] = {}
    with ZipFile(output, "w") as archive:
        for media_id in support_set.media:
            stored, digest = store.describe(media_id), hashlib.sha256()
            file = MEDIA_FOLDER + media_id + SUFFIXES.get(stored.media_type, "")
            with archive.open(_entry(file, ZIP_STORED, stored.num_bytes), "w") as entry:
                for piece in store.pieces(media_id):
                    digest.update(piece)
                    entry.write(piece)
                    yield output.take()
            media[media_id] = {"type": stored.kind, "file": file, "sha256": digest.hexdigest()}
        with archive.open(_entry(EXAMPLES, ZIP_DEFLATED), "w", force_zip64=True) as lines:
            for piece in _pieces(support_set.examples, media):
                lines.write(piece)
                yield output.take()
        archive.writestr(_entry(MANIFEST, ZIP_DEFLATED), _manifest(support_set, metadata, len(media)))
    yield output.take()


class _Output(io.RawIOBase):
    """A file that can only be appended to, from which written bytes are taken."""

    def __init__(self) -> None:
        self._unsent = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._unsent += data
        return len(data)

    def take(self) -> bytes:
        piece = bytes(self._unsent)
        self._unsent.clear()
        return piece


def _entry(name: str, compression: int, size: int = 0) -> ZipInfo:
    """Return an entry with the date of ZIP's epoch, and with permissions that let the user read the unpacked file."""
    entry = ZipInfo(name)
    entry.file_size = size
    entry.compress_type = compression
    entry.create_system = 3  # Unix, whatever this system is
    entry.external_attr = 0o644 << 16
    return entry


def _pieces(examples: tuple[Example, ...], media: dict[str, dict[str, str]]) -> Iterator[bytes]:
    lines = bytearray()
    for example in examples:
        lines += encode(_fields(example, media)) + b"\n"
        if len(lines) >= PIECE_BYTES:
            yield bytes(lines)
            lines.clear()
    yield bytes(lines)


def _fields(example: Example, media: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Return the fields of an `ArchivedExample` without the empty ones."""
    fields = {
        "id": example.id,
        "media": [media[media_id] for media_id in example.media],
        "text": example.text,
        "question": example.question,
        "label": example.label,
        "metadata": msgspec.Raw(example.metadata_json) if example.metadata_json != NO_METADATA else None,
    }
    return {name: value for name, value in fields.items() if value}


def _manifest(support_set: SupportSet, metadata: dict[str, Any], num_media: int) -> bytes:
    fields = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": support_set.name,
        "metadata": metadata,
        "num_examples": len(support_set.examples),
        "num_media": num_media,
        "exported_from": {"support_set": support_set.id, "version": support_set.version},
    }
    return encode(fields) + b"\n"
