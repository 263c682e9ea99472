"""Reads the archive of a support set from an untrusted file, without unpacking it to disk.

An entry to which no example refers is refused. Every size is limited before memory is allocated: that of the directory, of
the texts, of a media item, and of everything unpacked.
"""

from __future__ import annotations

import errno
import hashlib
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import BinaryIO, cast
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import msgspec

from server.errors import InvalidArchive, InvalidMedia, InvalidRequest, TooManyExamples
from server.media.source import EncodedMedia, encoded, too_large
from server.schemas.archive import (
    EXAMPLES,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    MEDIA_FOLDER,
    ArchivedExample,
    ArchivedMedia,
    Manifest,
)
from server.schemas.base import SchemaType, read
from server.schemas.separators import MAX_SEPARATORS, check_separators
from server.settings import Settings

# a ZIP file's directory is read as a whole: a media item takes about 150 bytes of it
MAX_DIRECTORY_BYTES = 8 * 2**20
DIRECTORY_BYTES_PER_EXAMPLE = 200
# limit of JSON separators per example; if there are few examples, each may have more, up to the limit of a body
SEPARATORS_PER_EXAMPLE = {b",": 64, b":": 32, b"[": 16, b"{": 16}
# earlier versions indented the manifest, whose metadata may be lists in each other
MAX_MANIFEST_BYTES = 2**18
# limit of a line: the texts of an example, even if all are escaped, with its metadata and the names of its media
MAX_LINE_BYTES = 2 * 2**20
READ_BYTES = 2**18
COMPRESSIONS = {ZIP_STORED, ZIP_DEFLATED}
IS_ENCRYPTED = 1
# the errors that zipfile raises for a damaged file
ZIP_ERRORS = (
    *(BadZipFile, EOFError, NotImplementedError, OverflowError, RuntimeError, ValueError),
    *(struct.error, zlib.error),
)


class Archive:
    """An open archive whose manifest and examples have been read. All calls block; any thread may make them.

    Its limits in the `settings` are those of requests that create the same set.
    `media` are the media of the examples, each with the path of the first reference to it.
    """

    def __init__(self, file: BinaryIO, settings: Settings) -> None:
        """Read the manifest and the examples. Raises `InvalidArchive`, `TooManyExamples` and `BodyTooLarge`."""
        self._settings = settings
        with _zip_errors():
            self._zip = ZipFile(cast(BinaryIO, _LimitedFile(file, settings)))
        self._entries = {entry.filename: entry for entry in self._zip.infolist() if entry.filename != MEDIA_FOLDER}
        self._check_entries()
        self.manifest = self._read_manifest()
        self.examples = list(self._read_examples())
        self.media = _media(self.examples)
        self._check_files()

    def read_media(self, item: ArchivedMedia, param: str) -> EncodedMedia:
        """Return a media item, whose bytes are read from the file again when they are needed.

        Raises `InvalidMedia` for too many bytes, and `InvalidArchive` for bytes of another digest.
        """
        entry = self._entries[item.file]
        if entry.file_size > self._settings.max_media_bytes:
            raise too_large(entry.file_size, self._settings.max_media_bytes, param)
        data = self._read(entry)
        if not data:
            raise InvalidMedia("the media's data is empty", param=param)
        if hashlib.sha256(data).hexdigest() != item.sha256:
            raise InvalidArchive(
                f"{item.file}: the SHA-256 of the file differs from the one in the example", param=param
            )
        return replace(encoded(data, item.type, param), source=partial(self._read, entry))

    def _read(self, entry: ZipInfo) -> bytes:
        with _zip_errors(entry.filename), self._zip.open(entry) as file:
            return b"".join(iter(partial(file.read, READ_BYTES), b""))

    def _check_entries(self) -> None:
        if len(self._entries) < sum(entry.filename != MEDIA_FOLDER for entry in self._zip.infolist()):
            raise InvalidArchive("two files of the archive have the same name")
        for entry in self._entries.values():
            if entry.compress_type not in COMPRESSIONS or entry.flag_bits & IS_ENCRYPTED:
                raise InvalidArchive(
                    f"{entry.filename[:64]!r} is encrypted, or compressed by another method than deflate"
                )
        if missing := next((name for name in (MANIFEST, EXAMPLES) if name not in self._entries), None):
            raise InvalidArchive(f"the archive has no file {missing}: it is not an exported support set")
        size = sum(entry.file_size for entry in self._entries.values())
        if size > self._settings.max_import_bytes:
            raise InvalidArchive(
                f"the archive has {size} bytes unpacked, the limit is {self._settings.max_import_bytes}"
            )

    def _read_manifest(self) -> Manifest:
        entry = self._entries[MANIFEST]
        if entry.file_size > MAX_MANIFEST_BYTES:
            raise InvalidArchive(f"{MANIFEST} has {entry.file_size} bytes, the limit is {MAX_MANIFEST_BYTES}")
        data = self._read(entry)
        _check_format(data)
        return _fields(Manifest, data, MANIFEST, "")

    def _read_examples(self) -> Iterator[ArchivedExample]:
        ids = set[str]()
        for index, line in enumerate(self._read_lines()):
            where, param = f"{EXAMPLES}, line {index + 1}", f"examples[{index}]"
            if len(line) > MAX_LINE_BYTES:
                raise InvalidArchive(f"{where}: it has more than {MAX_LINE_BYTES} bytes", param=param)
            example = _fields(ArchivedExample, line, where, param)
            if example.id in ids:
                message = f"{where}: an earlier example has the same id {example.id!r}"
                raise InvalidArchive(message, param=f"{param}.id")
            ids |= {example.id} if example.id is not None else set()
            yield example

    def _read_lines(self) -> Iterator[bytes]:
        """Yield the lines of the examples. Their number and that of all separators are limited."""
        entry, settings, counted = self._entries[EXAMPLES], self._settings, Counter[bytes]()
        if entry.file_size > settings.max_body_bytes:
            raise InvalidArchive(f"{EXAMPLES} has {entry.file_size} bytes, the limit is {settings.max_body_bytes}")
        max_separators = _max_separators(settings)
        with _zip_errors(EXAMPLES), self._zip.open(entry) as file:
            for index, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b"")):
                if index >= settings.max_set_examples:
                    message = f"the archive has more than {settings.max_set_examples} examples, which is the limit"
                    raise TooManyExamples(message, param="examples")
                check_separators(line, max_separators, EXAMPLES, counted)
                yield line

    def _check_files(self) -> None:
        """Check that the archive has exactly the files that it describes. Raises `InvalidArchive`."""
        media = {item.file: param for item, param in self.media.items()}
        if missing := next((file for file in media if file not in self._entries), None):
            raise InvalidArchive(f"the archive has no file {missing}", param=media[missing])
        if unknown := next((name for name in self._entries if name not in {MANIFEST, EXAMPLES, *media}), None):
            raise InvalidArchive(f"the archive has a file {unknown[:64]!r}, which no example shows")
        for name, stated, actual in (
            ("num_examples", self.manifest.num_examples, len(self.examples)),
            ("num_media", self.manifest.num_media, len(media)),
        ):
            if stated not in (None, actual):
                raise InvalidArchive(f"{MANIFEST}: {name} is {stated}, and the archive has {actual}", param=name)


def _media(examples: Sequence[ArchivedExample]) -> dict[ArchivedMedia, str]:
    references: dict[ArchivedMedia, str] = {}
    for index, example in enumerate(examples):
        for position, item in enumerate(example.media):
            references.setdefault(item, f"examples[{index}].media[{position}]")
    return references


def _max_separators(settings: Settings) -> dict[bytes, int]:
    """Return the limits of separators in all examples together."""
    return {
        separator: max(MAX_SEPARATORS[separator], settings.max_set_examples * number)
        for separator, number in SEPARATORS_PER_EXAMPLE.items()
    }


class _LimitedFile:
    """A file that refuses a single read of more than a ZIP file's directory may have."""

    def __init__(self, file: BinaryIO, settings: Settings) -> None:
        self._file = file
        self._max_read = max(MAX_DIRECTORY_BYTES, settings.max_set_examples * DIRECTORY_BYTES_PER_EXAMPLE)
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > self._max_read:
            raise BadZipFile("its directory is too large")
        return self._file.read(size)


def _check_format(manifest: bytes) -> None:
    """Check the format before anything else, because the fields of another one are unknown. Raises `InvalidArchive`."""
    try:
        fields = msgspec.json.decode(manifest, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        raise InvalidArchive(f"{MANIFEST} is not a JSON object") from None
    except RecursionError:
        raise InvalidArchive(f"{MANIFEST} has too many lists and objects in each other") from None
    name, version = (
        bytes(fields.get(key, b"null"))[:64].decode(errors="replace") for key in ("format", "format_version")
    )
    if name != f'"{FORMAT}"':
        raise InvalidArchive(f'{MANIFEST}: format is {name}, expected "{FORMAT}"', param="format")
    if version != str(FORMAT_VERSION):
        message = f"{MANIFEST}: format_version is {version}, this server reads {FORMAT_VERSION}"
        raise InvalidArchive(message, param="format_version")


def _fields(schema: type[SchemaType], data: bytes, where: str, param: str) -> SchemaType:
    """Validate a part of the archive as a request. Raises `InvalidArchive`, which names the place."""
    try:
        return read(schema, data)
    except InvalidRequest as error:
        message = error.message.replace("the body is not JSON", "not JSON")
        path = ".".join(step for step in (param, error.param) if step)
        raise InvalidArchive(f"{where}: {message}", param=path or None) from None


@contextmanager
def _zip_errors(name: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise  # the disk fails
        reason = "an offset is outside of it"
    except ZIP_ERRORS as error:
        reason = str(error)
    else:
        return
    part = f"{name[:64]!r} in it" if name else "it"
    raise InvalidArchive(f"the body is not a ZIP archive that can be read: {part} is damaged ({reason})")
