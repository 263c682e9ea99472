"""/v1/images: images and videos that are uploaded once and named by id from then on, in prompts and support sets.

The id is the content's, so an upload may be repeated. Nothing is stored that the decode pool has not decoded to the end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import JSONResponse
from server.api.services import GivenServices, GivenTicket
from server.api.upload import read_upload
from server.errors import MediaNotFound, StorageUnavailable
from server.media.source import EncodedMedia
from server.media.store import MediaStore, StoredMedia
from server.schemas.base import Schema
from server.schemas.completions import read_query
from server.services import Services

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


class ListRequest(Schema):
    limit: Annotated[int, Field(ge=1, le=1000, strict=False)] = 20
    after: Annotated[str, Field(max_length=128)] = ""
    object: Literal["image", "video"] | None = None


@router.post("/v1/images")
async def upload_image(request: Request, services: GivenServices, ticket: GivenTicket) -> Response:
    media = await read_upload(request, services.settings, services.media)
    for _ in range(MAX_ATTEMPTS):
        await _keep(media, services)
        try:
            return JSONResponse(_card(await asyncio.to_thread(services.store.describe, media.id)))
        except MediaNotFound:
            continue
    raise StorageUnavailable("the media was deleted while it was stored")


@router.get("/v1/images")
async def list_images(request: Request, services: GivenServices) -> Response:
    """In the order of their ids, which is no order of time."""
    fields = read_query(ListRequest, request.query_params)
    page = await asyncio.to_thread(_page, services.store, fields)
    shown = page[: fields.limit]
    return JSONResponse(
        {
            "object": "list",
            "data": [_card(stored) for stored in shown],
            "first_id": shown[0].id if shown else None,
            "last_id": shown[-1].id if shown else None,
            "has_more": len(page) > len(shown),
        }
    )


@router.api_route("/v1/images/{image_id}", methods=["GET", "HEAD"])
async def show_image(image_id: str, services: GivenServices) -> Response:
    return JSONResponse(_card(await asyncio.to_thread(services.store.describe, image_id, "image_id")))


@router.api_route("/v1/images/{image_id}/content", methods=["GET", "HEAD"])
async def show_content(image_id: str, request: Request, services: GivenServices) -> Response:
    stored = await asyncio.to_thread(services.store.describe, image_id, "image_id")
    headers = {**CONTENT_HEADERS, "ETag": f'"{stored.id}"'}
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    media = await asyncio.to_thread(services.store.get, image_id, "image_id")
    return Response(media.data, media_type=stored.media_type, headers=headers)


@router.delete("/v1/images/{image_id}")
async def delete_image(image_id: str, services: GivenServices) -> Response:
    stored = await asyncio.to_thread(services.store.describe, image_id, "image_id")
    await services.media_references.delete(image_id)
    return JSONResponse({"id": stored.id, "object": stored.kind, "deleted": True})


async def _keep(media: EncodedMedia, services: Services) -> None:
    """Decoded, unless the same bytes have been, and stored; told to the support sets: they may show it, now or soon."""
    if not await asyncio.to_thread(services.store.is_decoded, media.id):
        started = time.monotonic()
        frames = await services.decoder.decode(media)
        services.metrics.media_decode.observe(time.monotonic() - started)
        num_frames = frames.shape[0]
        await asyncio.to_thread(services.store.put, media.data, media.kind, size=frames.size, num_frames=num_frames)
        services.metrics.media_stored.inc()
    await services.media_references.mark_uploaded(media.id, len(media.data))


def _page(store: MediaStore, fields: ListRequest) -> list[StoredMedia]:
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
