"""Backups: all stored data as one tar file, from which any database and any media store can be restored.

A backup is a snapshot of the tables, with a line of JSON per row, and of the files of the media store to which they refer.
It does not depend on the kind of database, so it can also move the data of a server from SQLite to PostgreSQL. The tables
keep their version; a restored database is upgraded.
"""

from __future__ import annotations

import base64
import io
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

import msgspec
from sqlalchemy import Connection, LargeBinary, MetaData, Select, Table, func, insert, or_, select, text
from sqlalchemy.exc import SQLAlchemyError

from server.access.tenants import TENANT_NAME, split
from server.errors import MediaNotFound
from server.media.store import MediaStore
from server.settings import SettingsError
from server.store import schema
from server.store.database import Database, lock_schema
from server.version import VERSION

FORMAT = 1
MANIFEST, TABLES, MEDIA = "backup.json", "tables/", "media/"
# All tables except the version, which a restored database creates itself, and the leases of running requests. A schema of
# PostgreSQL may also have tables of other applications.
STORED = {
    "api_keys",
    "embeddings",
    "evaluation_cells",
    "evaluations",
    "example_media",
    "examples",
    "first_answers",
    "fits",
    "media",
    "support_set_versions",
    "support_sets",
}
ROWS_PER_STATEMENT = 500
# snapshots: if a media item is deleted while media are copied, the next one does not refer to it
MAX_SNAPSHOTS = 3

encode, decode = msgspec.json.Encoder().encode, msgspec.json.Decoder(dict[str, Any]).decode


class BackupError(SettingsError):
    """The file is not a backup that this server can restore, or the database is not empty; the message says why."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of a backup. `schema` is the version of its tables, `rows` their numbers of rows.

    `missing` are the ids of media to which the tables refer but which the media store does not have. `num_media` also
    counts media that were deleted after they were copied; they are not restored.
    """

    format: int
    server: str
    schema: str
    created_at: float
    rows: dict[str, int]
    num_media: int
    missing: list[str]


async def write_backup(file: Path, database: Database, store: MediaStore) -> Manifest:
    """Write a backup of a server, which may run, to a new file. Raises `BackupError` and `ServerError`."""
    if file.exists():
        raise BackupError(f"{file} exists already")
    try:
        # a folder that only this user may read
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as name:
            partial = Path(name, file.name)
            with tarfile.open(partial, "w") as archive:
                manifest = await _write(archive, Path(name), database, store)
            _publish(partial, file)
    except OSError as error:  # it names no file if the disk is full
        raise BackupError(f"{file}: the backup cannot be written: {error.strerror}") from None
    return manifest


def _publish(partial: Path, file: Path) -> None:
    """Move a complete file to its path, durably; only this user may read it. Raises `BackupError` if the path exists."""
    partial.chmod(0o600)
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    try:
        os.link(partial, file)  # unlike a rename, never over another file
    except FileExistsError:
        raise BackupError(f"{file} exists already") from None
    except OSError as error:
        raise BackupError(
            f"{file}: the backup cannot be moved there, because the file system has no hard links ({error.strerror}): "
            "write it to another folder, then copy it"
        ) from None


async def restore_backup(file: Path, database: Database, store: MediaStore) -> Manifest:
    """Restore a backup into an empty database, all or nothing, and its media into the store.

    Raises `BackupError`, `ServerError` and `OSError`. Media that were stored before an error stay; they are the same ones
    when the backup is restored again.
    """
    with _open(file) as archive, _damage():
        manifest = _read_manifest(archive)
        media = _check_members(archive, manifest)
        await database.use_as_is(lambda session, now: _require_empty(session.connection()), is_writing=False)
        _restore_media(archive, store)
        await database.use_as_is(
            lambda session, now: _restore_tables(session.connection(), archive, manifest, media), is_writing=True
        )
    return manifest


async def _write(archive: tarfile.TarFile, folder: Path, database: Database, store: MediaStore) -> Manifest:
    copied = set[str]()
    for _ in range(MAX_SNAPSHOTS):
        revision, rows, media = await database.use_as_is(
            lambda session, now: _export_tables(session.connection(), folder), is_writing=False
        )
        new = [media_id for media_id in media if media_id not in copied]
        missing = [media_id for media_id in new if not _add_media(archive, media_id, store)]
        copied.update(new)
        copied.difference_update(missing)
        if not missing:
            break
    for name in rows:
        archive.add(folder / name, TABLES + name)
    manifest = Manifest(
        format=FORMAT,
        server=VERSION,
        schema=revision,
        created_at=time.time(),
        rows=rows,
        num_media=len(copied),
        missing=missing,
    )
    _add(archive, MANIFEST, encode(manifest))
    return manifest


def _add_media(archive: tarfile.TarFile, media_id: str, store: MediaStore) -> bool:
    """Copy a media item, and return whether the store has it."""
    tenant, own_id = split(media_id)
    try:
        content = store.of(tenant).get_file(own_id)
    except MediaNotFound:
        return False
    _add(archive, MEDIA + media_id, content)
    return True


def _export_tables(connection: Connection, folder: Path) -> tuple[str, dict[str, int], list[str]]:
    """Write a file per table, and return the tables' version, their numbers of rows, and the ids of all media.

    Tables of a newer server are refused: it may have some that this one does not know.
    """
    revision = schema.read_known(connection)
    if revision is None:
        raise BackupError("the database is empty: there is nothing to back up")
    tables = {table.name: table for table in _tables(connection)}
    # media that only a request in progress has leased are not stored yet, or never will be
    media, references = tables["media"], tables["example_media"].c.media_id
    stored = select(media).where(or_(media.c.is_uploaded, media.c.media_id.in_(select(references))))
    queries = {name: stored if name == "media" else select(table) for name, table in tables.items()}
    rows = {name: _export(connection, query, folder / name) for name, query in queries.items()}
    return revision, rows, list(connection.scalars(stored.order_by(media.c.media_id)))


def _export(connection: Connection, query: Select[Any], file: Path) -> int:
    count = 0
    with file.open("wb") as lines:
        for row in connection.execute(query, execution_options={"yield_per": ROWS_PER_STATEMENT}).mappings():
            lines.write(encode(dict(row)) + b"\n")
            count += 1
    return count


def _tables(connection: Connection) -> list[Table]:
    """Return the existing tables of the database, each after those to which it refers."""
    metadata = MetaData()
    metadata.reflect(connection, only=lambda name, _: name in STORED)
    return metadata.sorted_tables


def _require_empty(connection: Connection) -> None:
    for table in _tables(connection):
        if connection.scalar(select(func.count()).select_from(table)):
            raise BackupError(f"database: it is not empty: the table {table.name} has rows")


def _check_members(archive: tarfile.TarFile, manifest: Manifest) -> set[str]:
    """Check that the file has the tables and media of its manifest, and return the ids of the media."""
    names = {member.name for member in archive.getmembers()}
    media = {name.removeprefix(MEDIA) for name in names if name.startswith(MEDIA)}
    if len(media) != manifest.num_media:
        raise BackupError(f"the backup is damaged: it has {len(media)} media, and should have {manifest.num_media}")
    tables = {name.removeprefix(TABLES) for name in names if name.startswith(TABLES)}
    if differing := sorted(tables ^ manifest.rows.keys()):
        raise BackupError(f"the backup is damaged: its tables are not those of {MANIFEST}: {differing[0][:80]!r}")
    return media


def _restore_media(archive: tarfile.TarFile, store: MediaStore) -> None:
    """Restore the media that have a row."""
    known = {decode(line)["media_id"] for line in _content(archive, archive.getmember(TABLES + "media"))}
    for member in archive.getmembers():
        if member.name.startswith(MEDIA):
            media_id = member.name.removeprefix(MEDIA)
            tenant, own_id = split(media_id)
            if tenant and re.fullmatch(TENANT_NAME, tenant) is None:  # before it becomes part of a path
                raise BackupError(f"the backup is damaged: {tenant[:80]!r} is not a tenant's name")
            if media_id not in known:
                continue
            try:
                store.of(tenant).put_file(own_id, _content(archive, member).read())
            except MediaNotFound:
                raise BackupError(f"the backup is damaged: {media_id} does not have the bytes of its id") from None


def _restore_tables(connection: Connection, archive: tarfile.TarFile, manifest: Manifest, media: set[str]) -> None:
    """Restore the rows, which must be complete and refer to `media` or to media that were missing."""
    lock_schema(connection)  # a server that starts meanwhile waits
    _require_empty(connection)
    if schema.read_revision(connection) is None:
        schema.upgrade(connection, manifest.schema)
    tables = {table.name: table for table in _tables(connection)}
    is_older = manifest.schema != schema.read_revision(connection)  # then it lacks the tables that are newer
    if differing := manifest.rows.keys() - tables.keys() if is_older else manifest.rows.keys() ^ tables.keys():
        raise BackupError(f"the backup is damaged: it does not have the tables of a server: {min(differing)[:80]!r}")
    for table in tables.values():
        if table.name in manifest.rows:
            count = _restore(connection, table, _content(archive, archive.getmember(TABLES + table.name)))
            if count != manifest.rows[table.name]:
                raise BackupError(f"the backup is damaged: {table.name} lacks rows")
    if lost := {*connection.scalars(select(tables["media"].c.media_id))} - media - {*manifest.missing}:
        raise BackupError(f"the backup is damaged: it lacks the media item {min(lost)[:80]}")
    schema.upgrade(connection)


def _restore(connection: Connection, table: Table, lines: IO[bytes]) -> int:
    """Insert rows, and return their number."""
    count = 0
    names = {column.name for column in table.columns}
    binary = [column.name for column in table.columns if isinstance(column.type, LargeBinary)]
    while rows := [decode(line) for line in islice(lines, ROWS_PER_STATEMENT)]:
        for row in rows:
            if row.keys() != names:
                raise BackupError(f"the backup is damaged: a row of {table.name} has other columns than the table")
            row.update({name: base64.b64decode(row[name]) for name in binary})
        connection.execute(insert(table), rows)
        count += len(rows)
    if connection.dialect.name == "postgresql" and (key := table.autoincrement_column) is not None:
        # new rows continue after the restored ones
        sequence = text("SELECT setval(pg_get_serial_sequence(:table, :column), greatest(:last, 1))")
        last = connection.scalar(select(func.coalesce(func.max(key), 0)))
        connection.execute(sequence, {"table": table.name, "column": key.name, "last": last})
    return count


def _open(file: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(file, "r:")
    except (tarfile.TarError, IsADirectoryError):
        raise BackupError("the file is not a backup") from None


@contextmanager
def _damage() -> Iterator[None]:
    """Convert the errors that a damaged file causes to `BackupError`."""
    try:
        yield
    except SettingsError:  # it is a ValueError, too
        raise
    except (KeyError, RecursionError, tarfile.TarError, TypeError, ValueError, OverflowError, SQLAlchemyError):
        # without its text, which may have the values of a row
        raise BackupError("the backup is damaged: a part of it cannot be read") from None


def _read_manifest(archive: tarfile.TarFile) -> Manifest:
    """Read the last member, which a truncated backup lacks. Raises `BackupError`."""
    try:
        manifest = msgspec.json.decode(_content(archive, archive.getmember(MANIFEST)).read(), type=Manifest)
    except (KeyError, tarfile.TarError, msgspec.DecodeError):
        raise BackupError(f"the file is not a complete backup: it has no readable {MANIFEST}") from None
    if manifest.format > FORMAT:
        raise BackupError(
            f"the backup was written by a newer server, of version {manifest.server[:80]}, or is damaged: "
            f"it has the format {manifest.format}, this server supports {FORMAT}"
        )
    if manifest.schema not in schema.REVISIONS:
        raise BackupError(
            f"the backup was written by a newer server, of version {manifest.server[:80]}, or is damaged: "
            f"its tables have version {manifest.schema[:80]!r}, this server supports {schema.FIRST} to {schema.NEWEST}"
        )
    return manifest


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member) if member.isreg() else None
    if content is None:
        raise BackupError(f"the backup is damaged: {member.name} is not a file")
    return content


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime = len(data), int(time.time())
    archive.addfile(entry, io.BytesIO(data))
