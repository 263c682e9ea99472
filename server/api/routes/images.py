"""/v1/images: images and videos that are uploaded once and named by id from then on, in prompts and support sets.

The id is the content's, so an upload may be repeated. Nothing is stored that the decode pool has not decoded to the end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import JSONResponse
from server.api.openapi import JSON, MEDIA, QUEUE, describe
from server.api.services import GivenServices, GivenTicket, Services
from server.api.upload import read_upload
from server.errors import (
    DatabaseUnavailable,
    MediaInUse,
    MediaNotFound,
    StorageUnavailable,
    UnsupportedMediaType,
)
from server.media.source import EncodedMedia
from server.media.store import MediaStore, StoredMedia
from server.schemas.base import list_page, read_query
from server.schemas.images import ListImagesRequest, UploadForm, UploadRequest
from server.schemas.responses.base import Deleted
from server.schemas.responses.images import StoredImage, StoredImages

router = APIRouter()

# times that a media may be swept away, with a support set that brought it, while it is uploaded
MAX_ATTEMPTS = 3
# bytes of strangers: nothing in them may run or be taken for another type, and an id's never change
CONTENT_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "private, max-age=31536000, immutable",
}
UPLOAD_BODY = {
    JSON: UploadRequest,
    "multipart/form-data": UploadForm,
    "image/*": bytes,
    "video/*": bytes,
    "application/octet-stream": bytes,
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
    **describe("Images", body=UPLOAD_BODY, response=StoredImage, errors=(*MEDIA, *QUEUE, UnsupportedMediaType)),
)
async def upload_image(request: Request, services: GivenServices, ticket: GivenTicket) -> Response:
    """Store an image or a video, sent as its bytes, in a form, or in JSON."""
    media = await read_upload(request, services.settings, services.intake)
    for _ in range(MAX_ATTEMPTS):
        await _keep(media, services)
        try:
            return JSONResponse(_card(await asyncio.to_thread(services.store.describe, media.id)))
        except MediaNotFound:
            continue
    raise StorageUnavailable("the media was deleted while it was stored")


@router.get(
    "/v1/images",
    **describe("Images", query=ListImagesRequest, response=StoredImages, errors=(StorageUnavailable,)),
)
async def list_images(request: Request, services: GivenServices) -> Response:
    """List images and videos in the order of their ids, which is no order of time."""
    fields = read_query(ListImagesRequest, request.query_params)
    page = await asyncio.to_thread(_page, services.store, fields)
    return JSONResponse(list_page([_card(stored) for stored in page], fields.limit))


@router.head(
    "/v1/images/{image_id}", name="head_image", **describe("Images", response=StoredImage, errors=STORED_IMAGE)
)
@router.get("/v1/images/{image_id}", **describe("Images", response=StoredImage, errors=STORED_IMAGE))
async def show_image(image_id: str, services: GivenServices) -> Response:
    """Describe an image or a video."""
    return JSONResponse(_card(await asyncio.to_thread(services.store.describe, image_id, "image_id")))


@router.head("/v1/images/{image_id}/content", name="head_content", **CONTENT)
@router.get("/v1/images/{image_id}/content", **CONTENT)
async def show_content(image_id: str, request: Request, services: GivenServices) -> Response:
    """Return the bytes of an image or a video."""
    stored = await asyncio.to_thread(services.store.describe, image_id, "image_id")
    headers = {**CONTENT_HEADERS, "ETag": f'"{stored.id}"'}
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    media = await asyncio.to_thread(services.store.get, image_id, "image_id")
    return Response(media.data, media_type=stored.media_type, headers=headers)


@router.delete(
    "/v1/images/{image_id}",
    **describe("Images", response=Deleted, errors=(*STORED_IMAGE, MediaInUse, DatabaseUnavailable)),
)
async def delete_image(image_id: str, services: GivenServices) -> Response:
    """Delete an image or a video that no support set shows."""
    stored = await asyncio.to_thread(services.store.describe, image_id, "image_id")
    await services.support_sets.delete_media(image_id)
    return JSONResponse({"id": stored.id, "object": stored.kind, "deleted": True})


async def _keep(media: EncodedMedia, services: Services) -> None:
    """Decoded, unless the same bytes have been, and stored; told to the support sets: they may show it, now or soon."""
    if not await asyncio.to_thread(_is_checked, services.store, media.id):
        started = time.monotonic()
        frames = await services.decoder.decode(media)
        services.metrics.media_decode.observe(time.monotonic() - started)
        num_frames = frames.shape[0]
        await asyncio.to_thread(services.store.put, media.data, media.kind, size=frames.size, num_frames=num_frames)
        services.metrics.media_stored.inc()
    await services.support_sets.mark_uploaded(media.id, len(media.data))


def _is_checked(store: MediaStore, name: str) -> bool:
    return store.exists(name) and store.describe(name).num_frames is not None


def _page(store: MediaStore, fields: ListImagesRequest) -> list[StoredMedia]:
    """One more than asked for, where there is one. What is deleted meanwhile is left out."""
    return list(islice(_described(store, store.names(fields.object, after=fields.after)), fields.limit + 1))


def _described(store: MediaStore, names: Iterator[str]) -> Iterator[StoredMedia]:
    for name in names:
        with suppress(MediaNotFound):
            yield store.describe(name)


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
