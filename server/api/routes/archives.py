"""Routes that export a support set as one file, an archive, and import it on this or another server.

An archive is written while it is sent. An arriving archive is stored in a temporary file and read from there. So both need
memory for only a few media at a time.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import content_type, read_query, spool_body
from server.api.examples import new_examples
from server.api.openapi import BODY, SUPPORT_SET_ERRORS, describe
from server.api.responses import download
from server.api.routes.support_sets import CREATE, KEY, idempotency_key
from server.api.services import GivenServices, Services
from server.api.set_cards import changed_response
from server.api.sse import unless_disconnected
from server.errors import (
    InvalidArchive,
    MediaNotFound,
    StorageUnavailable,
    UnsupportedMediaType,
)
from server.schemas.responses.stored import ChangedSupportSet
from server.schemas.stored import ImportRequest, VersionRequest
from server.settings import Settings
from server.store.archive_reader import Archive
from server.store.archive_writer import write_archive
from server.store.records import NewExample

router = APIRouter()

ZIP = "application/zip"
ARCHIVE = {ZIP: bytes, "application/octet-stream": bytes}

logger = logging.getLogger(__name__)


@router.get(
    "/v1/support_sets/{support_set}/export",
    **describe(
        "Support sets",
        query=VersionRequest,
        response={ZIP: bytes},
        errors=(*SUPPORT_SET_ERRORS, MediaNotFound, StorageUnavailable),
        response_headers=["Content-Disposition"],
    ),
)
async def export_support_set(support_set: str, request: Request, services: GivenServices) -> Response:
    """Export a version of a support set as an archive.

    The archive has the examples and the original bytes of their media. The default is the latest version.
    """
    fields = read_query(VersionRequest, request)
    version = await services.support_sets.get_version(support_set, fields.version)
    info = await services.support_sets.get(version.id, version.version)
    pieces = write_archive(version, info.metadata, services.media_store)
    name = f"{version.name or version.id}-v{version.version}.zip".replace(":", "_")
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "X-Content-Type-Options": "nosniff"}
    return await download(pieces, ZIP, headers, services.storage)


@router.post(
    "/v1/support_sets/import",
    **describe(
        "Support sets",
        body=ARCHIVE,
        query=ImportRequest,
        response=ChangedSupportSet,
        errors=(*BODY, *CREATE, InvalidArchive, UnsupportedMediaType),
        headers=KEY,
    ),
)
async def import_support_set(request: Request, services: GivenServices) -> Response:
    """Create a support set from an archive.

    The set has a new id and begins at version 1.
    """
    fields = read_query(ImportRequest, request)
    declared = content_type(request)
    if declared not in ARCHIVE:
        message = f"a body of type {declared[:64]!r}: send the archive as {' or '.join(ARCHIVE)}"
        raise UnsupportedMediaType(message, param="Content-Type")
    with services.imports.hold(request.state.ticket.client, closes=True):
        async with _received(request, services.settings) as (file, digest):
            work = _import(file, digest, fields, request, services)
            return await unless_disconnected(request.receive, work)


async def _import(file: BinaryIO, digest: str, fields: ImportRequest, request: Request, services: Services) -> Response:
    archive = await asyncio.to_thread(Archive, file, services.settings)
    name = fields.name or archive.manifest.name
    info = await services.support_sets.create(
        name,
        await _examples(archive),
        metadata=archive.manifest.metadata,
        idempotency_key=idempotency_key(request, f"{digest} {fields.name}".encode()),
        max_sets=request.state.caller.limits.support_sets,
    )
    return await changed_response(info, services)


async def _examples(archive: Archive) -> list[NewExample]:
    """Check the media of an archive, one after the other, and return its examples."""
    media = {item: await asyncio.to_thread(archive.read_media, item, param) for item, param in archive.media.items()}

    def create() -> list[NewExample]:
        return new_examples(archive.examples, [[media[item] for item in example.media] for example in archive.examples])

    return await asyncio.to_thread(create)


@asynccontextmanager
async def _received(request: Request, settings: Settings) -> AsyncIterator[tuple[BinaryIO, str]]:
    """Yield the body in a temporary file without a name, and its SHA-256. Raises what `spool_body` raises.

    The file is in the data folder: elsewhere, temporary files may be kept in memory.
    """
    async with AsyncExitStack() as stack:
        try:
            file = _temporary_file(settings.data_folder)
            stack.push_async_callback(asyncio.to_thread, _close, file)
            digest = await spool_body(request, settings, file)
        except OSError as error:
            logger.error("an archive cannot be stored", extra={"error": str(error)})
            raise StorageUnavailable("the archive cannot be stored: the disk is full or not writable") from None
        yield file, digest


def _temporary_file(folder: Path) -> BinaryIO:
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=folder)


def _close(file: BinaryIO) -> None:
    with suppress(OSError):  # on a full disk, closing tries again to write the rest
        file.close()
