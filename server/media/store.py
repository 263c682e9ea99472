"""Media that clients have uploaded, kept by content: the same bytes have one id, for good and on every replica.

One file a media, on any filesystem that fsspec knows: a line of JSON that describes it, then its bytes. A file is whole
or absent: on a local disk it is written beside its place, synced, and renamed into it. All calls block.
"""

from __future__ import annotations

import io
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
import msgspec
from fsspec.implementations.local import LocalFileSystem

from model.media import MediaError, media_type_of
from server.errors import MediaNotFound, StorageUnavailable
from server.media.source import EncodedMedia, Kind, digest_of, encoded, kind_of, media_id, source_digest

MEDIA_ID = re.compile(r"(img|vid)_[0-9a-f]{64}", re.ASCII)
# the first line of a file is shorter
MAX_HEAD_BYTES = 1024
# files of one kind and first digest byte share a folder: img_0a
FOLDER_CHARS = len("img_") + 2
UNFINISHED = "unfinished"
# a writer that has not come to its end by then is dead
UNFINISHED_SECONDS = 3600

logger = logging.getLogger(__name__)


class StoredMedia(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a media without its bytes. Width and height in pixels, of its first frame; `created` in Unix
    seconds. None: was stored undecoded."""

    id: str
    kind: Kind
    media_type: str
    num_bytes: int
    created: int
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None


encode_head = msgspec.json.Encoder().encode
decode_head = msgspec.json.Decoder(StoredMedia).decode


class MediaStore:
    """`url`: a folder, or any URL of fsspec (`s3://bucket/media`, `memory://`)."""

    def __init__(self, url: str) -> None:
        # without fsspec's memory of folders, which other replicas write to
        self._fs, self._root = fsspec.url_to_fs(url, use_listings_cache=False)
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def put(
        self, data: bytes, kind: Kind, *, size: tuple[int, int] | None = None, num_frames: int | None = None
    ) -> str:
        """Returns the id. It is durable when this returns. Bytes that are stored already stay, unless this is the first
        time that their size is told."""
        name = media_id(kind, source_digest(data, kind))
        if self.exists(name) and (size is None or self.describe(name).width is not None):
            return name
        head = StoredMedia(
            id=name,
            kind=kind,
            media_type=_media_type(data),
            num_bytes=len(data),
            created=int(time.time()),
            width=size[0] if size else None,
            height=size[1] if size else None,
            num_frames=num_frames,
        )
        with _storage_errors():
            self._write(self._path(name), encode_head(head) + b"\n" + data)
        return name

    def find(self, name: str, param: str = "") -> EncodedMedia:
        """Without its bytes, which are read when they are asked for. Raises `MediaNotFound`."""
        kind = kind_of(name)
        if kind is None or not self.exists(name):
            raise not_found(name, param)
        return EncodedMedia(kind=kind, data=lambda: self.get(name, param).data, digest=digest_of(name), param=param)

    def get(self, name: str, param: str = "") -> EncodedMedia:
        """Raises `MediaNotFound`; bytes that are no longer those of their id count as lost."""
        head, _, data = self._read(name, None, param).partition(b"\n")
        media = encoded(data, decode_head(head).kind, param)
        if media.id != name:
            logger.error("stored media is damaged", extra={"media": name})
            raise not_found(name, param)
        return media

    def describe(self, name: str, param: str = "") -> StoredMedia:
        """Raises `MediaNotFound`."""
        return decode_head(self._read(name, MAX_HEAD_BYTES, param).partition(b"\n")[0])

    def exists(self, name: str) -> bool:
        with _storage_errors():
            return MEDIA_ID.fullmatch(name) is not None and bool(self._fs.exists(self._path(name)))

    def is_decoded(self, name: str) -> bool:
        """Return whether it is stored, and was decoded before."""
        return self.exists(name) and self.describe(name).num_frames is not None

    def size(self, name: str) -> int:
        """Bytes of the media. Raises `MediaNotFound`."""
        return self.describe(name).num_bytes

    def delete(self, name: str) -> None:
        """Raises `MediaNotFound`."""
        self._check(name, "")
        with _storage_errors(), _absence(name, ""):
            self._fs.rm_file(self._path(name))

    def names(self, kind: Kind | None = None, *, after: str = "") -> Iterator[str]:
        """Ids in their order, those behind `after` only."""
        for folder in self._listed(self._root):
            is_listed = kind_of(folder) == kind if kind else kind_of(folder) is not None
            if is_listed and folder >= after[:FOLDER_CHARS]:
                yield from (name for name in self._listed(f"{self._root}/{folder}") if name > after)

    def sweep(self) -> None:
        """Remove what writers that were killed have left."""
        folder = Path(self._root, UNFINISHED)
        if self.is_local and folder.is_dir():
            for file in folder.iterdir():
                if file.stat().st_mtime < time.time() - UNFINISHED_SECONDS:
                    file.unlink(missing_ok=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name[:FOLDER_CHARS]}/{name}"

    def _check(self, name: str, param: str) -> None:
        if MEDIA_ID.fullmatch(name) is None:  # before it can become part of a path
            raise not_found(name, param)

    def _read(self, name: str, end: int | None, param: str) -> bytes:
        self._check(name, param)
        with _storage_errors(), _absence(name, param):
            data: bytes = self._fs.cat_file(self._path(name), end=end)
        return data

    def _listed(self, folder: str) -> list[str]:
        entries = []
        with _storage_errors(), suppress(FileNotFoundError):
            entries = self._fs.ls(folder, detail=False, refresh=True)
        return sorted(entry.rstrip("/").rpartition("/")[2] for entry in entries)

    def _write(self, path: str, content: bytes) -> None:
        if not self.is_local:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, content)  # an object appears whole
            return
        place, unfinished = Path(path), Path(self._root, UNFINISHED)
        for folder in (place.parent, unfinished):
            folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=unfinished)
        try:
            with io.FileIO(descriptor, "wb") as file:
                _write_all(file, content)
                os.fsync(file.fileno())
            os.replace(temporary, place)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_folder(place.parent)


def not_found(name: str, param: str = "") -> MediaNotFound:
    return MediaNotFound(f"there is no media {name[:80]!r}", param=param or None)


@contextmanager
def _absence(name: str, param: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise not_found(name, param) from None


@contextmanager
def _storage_errors() -> Iterator[None]:
    """A full disk, missing rights, a store that does not answer: an operator's business, and told without paths."""
    try:
        yield
    except OSError as error:
        logger.error("the media store does not work", exc_info=error)
        raise StorageUnavailable("the media store does not work") from None


def _media_type(data: bytes) -> str:
    try:
        return media_type_of(data)
    except MediaError:
        return "application/octet-stream"


def _write_all(file: io.FileIO, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _sync_folder(folder: Path) -> None:
    """The rename itself survives a power cut only once its folder is synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
