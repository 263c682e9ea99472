"""Routes of `/v1/images`: images and videos are uploaded once, then named by id in prompts and support sets.

The id is derived from the content, so an upload may be repeated. Only media that the decode pool has decoded are stored.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from functools import partial
from typing import Any

from fastapi import APIRouter
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from model.media import MediaError, media_type_of
from server.api.body import content_type, read_body, read_json, read_query, stream_body
from server.api.openapi import MEDIA, describe
from server.api.responses import JSON, JSONResponse, download, is_known
from server.api.services import GivenServices, Services
from server.api.sse import unless_disconnected
from server.errors import (
    DatabaseUnavailable,
    InvalidMedia,
    InvalidRequest,
    MediaInUse,
    MediaNotFound,
    StorageUnavailable,
    UnsupportedMediaType,
    UnsupportedParameter,
)
from server.media.intake import Intake
from server.media.source import EncodedMedia, Kind, encoded, kind_of, read_data_url, too_large
from server.media.store import MediaStore, StoredMedia, not_found
from server.schemas.base import list_page
from server.schemas.responses.base import Deleted
from server.schemas.responses.stored import StoredImage, StoredImages
from server.schemas.stored import ListImagesRequest, UploadForm, UploadRequest
from server.settings import Settings
from server.store.media_references import LeaseLost

router = APIRouter()

FORM = "multipart/form-data"
FORM_FIELD = "file"
# Python has other charsets that take time quadratic in the number of bytes, or that decode to invalid Unicode
FORM_CHARSETS = (b"utf-8", b"utf8", b"us-ascii")
# maximum bytes of a field that is not a file; such a field is refused, because a form has only a file
MAX_FIELD_BYTES = 256
BYTES = "application/octet-stream"
RAW = ("image/", "video/", BYTES)

# attempts to store an upload: another request may delete the same media item at the same time
MAX_ATTEMPTS = 3
# the bytes are untrusted: a browser must not run them or guess another type; the content of an id never changes
CONTENT_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "private, max-age=31536000, immutable",
    "Vary": "Authorization",
}
UPLOAD_BODY = {
    JSON: UploadRequest,
    FORM: UploadForm,
    "image/*": bytes,
    "video/*": bytes,
    BYTES: bytes,
}
STORED_IMAGE = (MediaNotFound, StorageUnavailable)
CONTENT = describe(
    "Images",
    response={"image/*": bytes, "video/*": bytes},
    errors=STORED_IMAGE,
    headers=["If-None-Match"],
    response_headers=["ETag"],
    statuses=(200, 304),
)


@router.post(
    "/v1/images",
    **describe("Images", body=UPLOAD_BODY, response=StoredImage, errors=(*MEDIA, UnsupportedMediaType)),
)
async def upload_image(request: Request, services: GivenServices) -> Response:
    """Upload an image or a video: raw bytes, a form, or JSON."""
    media = await read_upload(request, services)
    for _ in range(MAX_ATTEMPTS):
        try:
            await _keep(media, services, request.receive)
            return JSONResponse(_card(await asyncio.to_thread(services.media_store.describe, media.id)))
        except (LeaseLost, MediaNotFound):
            continue
    raise StorageUnavailable("the media was deleted while it was stored")


@router.get(
    "/v1/images",
    **describe("Images", query=ListImagesRequest, response=StoredImages, errors=(StorageUnavailable,)),
)
async def list_images(request: Request, services: GivenServices) -> Response:
    """List images and videos in the order of their ids."""
    fields = read_query(ListImagesRequest, request)
    page = await services.storage(_page, services.media_store, fields)
    return JSONResponse(list_page([_card(stored) for stored in page], fields.limit))


@router.get("/v1/images/{image_id}", **describe("Images", response=StoredImage, errors=STORED_IMAGE))
async def show_image(image_id: str, services: GivenServices) -> Response:
    """Describe an image or a video."""
    return JSONResponse(_card(await asyncio.to_thread(services.media_store.describe, image_id, "image_id")))


@router.get("/v1/images/{image_id}/content", **CONTENT)
async def show_content(image_id: str, request: Request, services: GivenServices) -> Response:
    """Return the bytes of an image or a video."""
    stored = await asyncio.to_thread(services.media_store.describe, image_id, "image_id")
    headers = {**CONTENT_HEADERS, "ETag": f'"{stored.id}"'}
    if is_known(headers["ETag"], request):
        return Response(status_code=304, headers=headers)
    headers["Content-Length"] = str(stored.num_bytes)
    return await download(services.media_store.pieces(image_id, "image_id"), stored.media_type, headers)


@router.delete(
    "/v1/images/{image_id}",
    **describe("Images", response=Deleted, errors=(*STORED_IMAGE, MediaInUse, DatabaseUnavailable)),
)
async def delete_image(image_id: str, services: GivenServices) -> Response:
    """Delete an image or a video that no support set contains."""
    if not await asyncio.to_thread(services.media_store.exists, image_id):
        raise not_found(image_id, "image_id")
    await services.media_references.delete(image_id)
    return JSONResponse({"id": image_id, "object": kind_of(image_id), "deleted": True})


async def _keep(media: EncodedMedia, services: Services, receive: Receive) -> None:
    """Store media as an upload; they are decoded first, unless the same bytes are stored already. Raises `LeaseLost`."""
    info: dict[str, Any] | None = None
    if not await asyncio.to_thread(services.media_store.is_decoded, media.id):
        started = time.monotonic()
        frames = await unless_disconnected(receive, services.decoder.decode(media))
        services.metrics.media_decode.observe(time.monotonic() - started)
        info = {"size": frames.size, "num_frames": frames.shape[0]}
    await services.media_references.upload(media, info)
    if info is not None:
        services.metrics.media_stored.inc()


def _page(store: MediaStore, fields: ListImagesRequest) -> list[StoredMedia]:
    """Return up to one more than the limit. Media deleted in the meantime are left out."""
    page: list[StoredMedia] = []
    for name in store.names(fields.object, after=fields.after):
        with suppress(MediaNotFound):
            page.append(store.describe(name))
        if len(page) > fields.limit:
            break
    return page


def _card(stored: StoredMedia) -> dict[str, Any]:
    return {
        "id": stored.id,
        "object": stored.kind,
        "bytes": stored.num_bytes,
        "media_type": stored.media_type,
        "width": stored.width,
        "height": stored.height,
        "frames": stored.num_frames,
        "created_at": stored.created,
    }


async def read_upload(request: Request, services: Services) -> EncodedMedia:
    """Return the media item of an upload in any of its three forms. Raises `InvalidRequest`."""
    settings, declared = services.settings, content_type(request)
    if declared == JSON:
        fields, _ = await read_json(UploadRequest, request, services)
        return await _from_json(fields, settings, services.intake)
    if declared == FORM:
        data, declared = await _from_form(request, settings)
        return _media(data, declared, settings, FORM_FIELD)
    if declared.startswith(RAW):
        return _media(await read_body(request, settings), declared, settings, "body")
    types = f"image/..., video/..., {BYTES}, {JSON} or {FORM}"
    message = (
        f"a body of type {declared[:64]!r}: the type of a body is {types}; with curl, add -H 'Content-Type: {BYTES}'"
    )
    raise UnsupportedMediaType(message, param="Content-Type")


async def _from_json(fields: UploadRequest, settings: Settings, intake: Intake) -> EncodedMedia:
    if fields.data is not None:
        # base64 alone is a data URL without a type: the type is read from the bytes
        url = f"data:;base64,{fields.data}"
        reading = partial(read_data_url, url, "image", max_bytes=settings.max_media_bytes, param="data")
        return _media((await asyncio.to_thread(reading)).data, "", settings, "data")
    assert fields.url is not None
    kind: Kind = "video" if fields.url.lower().startswith("data:video/") else fields.object
    return await intake.read_url(fields.url, kind, "url")


async def _from_form(request: Request, settings: Settings) -> tuple[bytes, str]:
    """Return the file's bytes and the content type that the form states."""
    _, parameters = parse_options_header(request.headers["Content-Type"])
    if (charset := parameters.get(b"charset", b"utf-8").lower()) not in FORM_CHARSETS:
        message = f"a form in the charset {charset[:64].decode('latin-1')!r}: the names in a form are UTF-8"
        raise UnsupportedMediaType(message, param="Content-Type")
    body = stream_body(request, settings)
    parser = MultiPartParser(request.headers, body, max_files=1, max_fields=1, max_part_size=MAX_FIELD_BYTES)
    parser.spool_max_size = settings.max_body_bytes  # in memory, which the request's ticket counts, not on disk
    try:
        form = await parser.parse()
    except MultiPartException:
        message = f"the body is not a form with one file, named {FORM_FIELD}, and nothing else"
        raise InvalidRequest(message, param=FORM_FIELD) from None
    try:
        if unknown := next((name for name in form if name != FORM_FIELD), None):
            message = f"unknown parameter {unknown[:64]}: a form has one file, named {FORM_FIELD}"
            raise UnsupportedParameter(message, param=unknown[:64])
        file = form.get(FORM_FIELD)
        if not isinstance(file, UploadFile):
            raise InvalidRequest(f"the form has no file named {FORM_FIELD}", param=FORM_FIELD)
        return await file.read(), (file.content_type or "").partition(";")[0].strip().lower()
    finally:
        await form.close()


def _media(data: bytes, content_type: str, settings: Settings, param: str) -> EncodedMedia:
    if len(data) > settings.max_media_bytes:
        raise too_large(len(data), settings.max_media_bytes, param)
    try:
        media_type = media_type_of(data)
    except MediaError as error:
        raise InvalidMedia(str(error), param=param) from None
    kind: Kind = "image" if media_type.startswith("image/") else "video"
    if content_type not in ("", BYTES) and not content_type.startswith(f"{kind}/"):
        raise InvalidMedia(f"the bytes are {media_type}, but were sent as {content_type[:64]}", param=param)
    return encoded(data, kind, param)
