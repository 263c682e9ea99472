"""The media store: uploaded media with ids derived from their content, so that they are equal on every replica.

Each media item is a file on any filesystem that fsspec supports: a line of JSON that describes it, then its bytes. A
file is complete or absent: on a local disk it is written to a temporary file, synced and renamed. All calls block.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import replace
from pathlib import Path

import fsspec
import msgspec
from fsspec.implementations.local import LocalFileSystem

from model.media import MediaError, media_type_of
from server.access.tenants import DEFAULT_TENANT
from server.errors import MediaNotFound, StorageUnavailable
from server.media.source import DIGEST_BYTES, EncodedMedia, Kind, begin_digest, digest_of, encoded, kind_of
from server.setting_values import without_password
from server.settings import SettingsError

MEDIA_ID = re.compile(rf"(img|vid)_[0-9a-f]{{{2 * DIGEST_BYTES}}}", re.ASCII)
# the maximum length of a file's first line
MAX_HEADER_BYTES = 1024
# bytes of a piece that is read for a download
PIECE = 2**16
# bytes that a remote store reads ahead for a download
BLOCK = 2**20
# files of one kind and first digest byte share a folder, such as img_0a
FOLDER_CHARS = len("img_") + 2
UNFINISHED = "unfinished"
# the folder of all tenants except the default one
TENANTS = "tenants"
# seconds after which the writer of an unfinished file counts as dead
UNFINISHED_SECONDS = 3600

# messages for errors of the operating system while writing
REASONS = {
    errno.ENOSPC: "its disk is full",
    errno.EDQUOT: "its disk quota is used up",
    errno.EROFS: "it is read-only",
}

logger = logging.getLogger(__name__)


class StoredMedia(msgspec.Struct, frozen=True, kw_only=True):
    """The description of a media item, without its bytes.

    `width` and `height` are those of its first frame in pixels, upright; they and `num_frames` are None if it was stored
    without being decoded. `created` is in Unix seconds.
    """

    id: str
    kind: Kind
    media_type: str
    num_bytes: int
    created: int
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None


encode_header = msgspec.json.Encoder().encode
decode_header = msgspec.json.Decoder(StoredMedia).decode


class LocalFolder:
    """The folder of a store on a local disk.

    It is created once. If it is missing later, its volume is no longer mounted, or it was moved. It is then not created
    again, because files in a new folder would be hidden when the old one returns. The folder of unfinished files
    distinguishes it from an empty mount point.
    """

    def __init__(self, path: str) -> None:
        self.unfinished = Path(path, UNFINISHED)
        self._was_there = False

    def create(self) -> None:
        """Create the folder, unless it has existed before."""
        if not self._was_there:
            self.unfinished.mkdir(parents=True, exist_ok=True)
            self._was_there = True

    def require(self) -> None:
        """Check that the folder still exists. Raises `StorageUnavailable`."""
        was_there = self._was_there  # read first: another thread may create the folder at any time
        if self.unfinished.is_dir():
            self._was_there = True
        elif was_there:
            logger.error("the media folder is missing", extra={"folder": str(self.unfinished.parent)})
            raise StorageUnavailable("the media folder is missing")


class MediaStore:
    """A tenant's part of the store at `url`: a folder, or any URL of fsspec (`s3://bucket/media`, `memory://`)."""

    def __init__(self, url: str) -> None:
        """Open a store for the default tenant. Raises `SettingsError` for a URL that fsspec cannot open."""
        try:
            # without fsspec's cache of listings, because other replicas write to the same folders
            self._fs, self._top = fsspec.url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            shown_url = without_password(url)
            # the reason may repeat parts of a password
            reason = ": " + str(error).rstrip(".") if shown_url == url else ""
            raise SettingsError(
                f"media_store: {shown_url!r} is not a folder or URL that fsspec can open{reason}"
            ) from None
        self._folder = LocalFolder(self._top) if isinstance(self._fs, LocalFileSystem) else None
        self.tenant = DEFAULT_TENANT

    def of(self, tenant: str) -> MediaStore:
        """Return the part of another tenant."""
        store = copy(self)
        store.tenant = tenant
        return store

    @property
    def _root(self) -> str:
        return f"{self._top}/{TENANTS}/{self.tenant}" if self.tenant else self._top

    def prepare(self) -> None:
        """Create the folder of a local store, and remove the unfinished files of writers that were killed.

        If that fails, the server starts and serves requests that need no media store.
        """
        with suppress(StorageUnavailable):
            self._create()
            self.sweep()

    def put(
        self, data: bytes, kind: Kind, *, size: tuple[int, int] | None = None, num_frames: int | None = None
    ) -> str:
        """Store media, durably, and return its id.

        An existing file stays, unless its header is damaged or lacks the size that is known now.
        """
        media_id = encoded(data, kind, "").id
        stored = self._described(media_id)
        if stored is not None and (size is None or stored.width is not None):
            return media_id
        header = StoredMedia(
            id=media_id,
            kind=kind,
            media_type=media_type(data),
            num_bytes=len(data),
            created=int(time.time()),
            width=size[0] if size else None,
            height=size[1] if size else None,
            num_frames=num_frames,
        )
        self._create()
        with self._storage_errors():
            self._write(self._path(media_id), encode_header(header) + b"\n" + data)
        return media_id

    def find(self, media_id: str, param: str = "") -> EncodedMedia:
        """Return a media item, at `param` of a request, whose bytes are read on first use. Raises `MediaNotFound`."""
        stored = self.describe(media_id, param)
        return replace(self.refer(media_id, param), num_bytes=stored.num_bytes)

    def refer(self, media_id: str, param: str) -> EncodedMedia:
        """Return what `find` returns, for an item that is known to be stored: without any access to the store."""
        return EncodedMedia(
            kind=_check_id(media_id, param),
            source=lambda: self.get(media_id, param).data,
            digest=digest_of(media_id),
            param=param,
            is_stored=True,
        )

    def get(self, media_id: str, param: str = "") -> EncodedMedia:
        """Return a media item with its bytes. Raises `MediaNotFound`, also if their digest does not match the id."""
        return _require_intact(media_id, self._read(media_id, None, param), param)

    def pieces(self, media_id: str, param: str = "") -> Iterator[bytes]:
        """Yield the bytes of a media item in pieces, from a file that stays open: it may be deleted or replaced meanwhile.

        Raises what `get` raises: for a damaged item before the last piece, which may be the first.
        """
        _check_id(media_id, param)
        with self._storage_errors(media_id, param), self._fs.open(self._path(media_id), "rb", block_size=BLOCK) as file:
            header, _, piece = file.read(PIECE).partition(b"\n")
            digest = begin_digest(_read_header(header, media_id, param).kind)
            digest.update(piece)
            while following := file.read(PIECE):
                yield piece
                piece = following
                digest.update(piece)
            if digest.digest() != digest_of(media_id):
                raise _damaged(media_id, param)
            yield piece

    def get_file(self, media_id: str) -> bytes:
        """Return the file of a media item: its description and its bytes. Raises what `get` raises."""
        file = self._read(media_id, None, "")
        _require_intact(media_id, file, "")
        return file

    def put_file(self, media_id: str, file: bytes) -> None:
        """Store a file that `get_file` of this or another store has returned. Raises `MediaNotFound` for any other."""
        _check_id(media_id, "")
        _require_intact(media_id, file, "")
        self._create()
        with self._storage_errors():
            self._write(self._path(media_id), file)

    def describe(self, media_id: str, param: str = "") -> StoredMedia:
        """Return the description of a media item. Raises `MediaNotFound`, also if the file's header is damaged."""
        return _read_header(self._read(media_id, MAX_HEADER_BYTES, param).partition(b"\n")[0], media_id, param)

    def exists(self, media_id: str) -> bool:
        with self._storage_errors():
            return MEDIA_ID.fullmatch(media_id) is not None and bool(self._fs.exists(self._path(media_id)))

    def is_decoded(self, media_id: str) -> bool:
        """Return whether the media item is stored, and was decoded before."""
        stored = self._described(media_id)
        return stored is not None and stored.num_frames is not None

    def delete(self, media_id: str) -> None:
        """Delete a media item. Raises `MediaNotFound`."""
        _check_id(media_id, "")
        with self._storage_errors(media_id):
            self._fs.rm_file(self._path(media_id))

    def names(self, kind: Kind | None = None, *, after: str = "") -> Iterator[str]:
        """Yield the ids after `after`, in order, of one kind or of both."""
        for folder in self._listed(self._root):
            is_listed = kind_of(folder) == kind if kind else kind_of(folder) is not None
            if is_listed and folder >= after[:FOLDER_CHARS]:
                yield from (media_id for media_id in self._listed(f"{self._root}/{folder}") if media_id > after)

    def sweep(self) -> None:
        """Remove the unfinished files of writers that were killed."""
        if self._folder is None or not self._folder.unfinished.is_dir():
            return
        with _file_errors():
            for file in self._folder.unfinished.iterdir():
                with suppress(FileNotFoundError):  # its writer has finished it
                    if file.stat().st_mtime < time.time() - UNFINISHED_SECONDS:
                        file.unlink()

    def _described(self, media_id: str) -> StoredMedia | None:
        """Return the description of a media item, or None if it cannot be read."""
        try:
            return self.describe(media_id)
        except MediaNotFound:
            return None

    def _create(self) -> None:
        if self._folder is not None:
            with _file_errors():
                self._folder.create()

    @contextmanager
    def _storage_errors(self, media_id: str = "", param: str = "") -> Iterator[None]:
        """Convert errors of the store, and a missing file. Raises `StorageUnavailable` and `MediaNotFound`."""
        with _file_errors(media_id, param):
            if self._folder is not None:
                self._folder.require()
            yield

    def _path(self, media_id: str) -> str:
        return f"{self._root}/{media_id[:FOLDER_CHARS]}/{media_id}"

    def _read(self, media_id: str, end: int | None, param: str) -> bytes:
        _check_id(media_id, param)
        with self._storage_errors(media_id, param):
            data: bytes = self._fs.cat_file(self._path(media_id), end=end)
        return data

    def _listed(self, folder: str) -> list[str]:
        entries = []
        with self._storage_errors(), suppress(FileNotFoundError):
            entries = self._fs.ls(folder, detail=False, refresh=True)
        return sorted(entry.rstrip("/").rpartition("/")[2] for entry in entries)

    def _write(self, path: str, content: bytes) -> None:
        if self._folder is None:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, content)  # atomic in an object store
            return
        target = Path(path)
        # one level after the other: the store's own folder may vanish at any time
        for level in range(len(target.relative_to(self._top).parts) - 2, -1, -1):
            target.parents[level].mkdir(exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self._folder.unfinished)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)


def not_found(media_id: str, param: str) -> MediaNotFound:
    return MediaNotFound(f"no image or video has the id {media_id[:80]!r}", param=param or None)


def _damaged(media_id: str, param: str) -> MediaNotFound:
    logger.error("stored media is damaged", extra={"media": media_id})
    return not_found(media_id, param)


def _require_intact(media_id: str, file: bytes, param: str) -> EncodedMedia:
    """Return the media item of a file. Raises `MediaNotFound` if it is damaged or has another id."""
    header, _, data = file.partition(b"\n")
    media = encoded(data, _read_header(header, media_id, param).kind, param)
    if media.id != media_id:
        raise _damaged(media_id, param)
    return media


def _read_header(header: bytes, media_id: str, param: str) -> StoredMedia:
    try:
        stored = decode_header(header)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise _damaged(media_id, param) from None
    if stored.id != media_id:
        raise _damaged(media_id, param)
    return stored


def _check_id(media_id: str, param: str) -> Kind:
    """Return the kind of media of an id, before it becomes part of a path. Raises `MediaNotFound`."""
    kind = kind_of(media_id)
    if kind is None or MEDIA_ID.fullmatch(media_id) is None:
        raise not_found(media_id, param)
    return kind


@contextmanager
def _file_errors(media_id: str = "", param: str = "") -> Iterator[None]:
    """Convert errors of the file system (full disk, missing permissions, unreachable store) to messages without paths.

    With `media_id`, a missing file means that this media item does not exist.
    """
    try:
        yield
    except OSError as error:
        if media_id and isinstance(error, FileNotFoundError):
            raise not_found(media_id, param) from None
        reason = REASONS.get(error.errno or 0)
        message = f"the media store is not writable: {reason}" if reason else "the media store does not work"
        # an error of the operating system needs no traceback
        trace = error if error.errno is None else None
        logger.error(message, exc_info=trace, extra={"error": str(error)})
        raise StorageUnavailable(message) from None


def media_type(data: bytes) -> str:
    """Return the media type of encoded bytes; a generic one if they are not an image or video."""
    try:
        return media_type_of(data)
    except MediaError:
        return "application/octet-stream"


def _sync_folder(folder: Path) -> None:
    """Sync the folder, so that a rename survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
