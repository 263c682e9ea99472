"""Descriptions of versions of support sets in responses. The labels of one version may take megabytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import msgspec
from starlette.responses import Response

from server.api.responses import JSON, JSONResponse, WholeResponse
from server.api.services import Services
from server.schemas.base import list_page
from server.store.records import SupportSetInfo

# limit of the texts and metadata in a page of examples, and of the labels in a page of sets; some take six bytes in JSON
MAX_PAGE_CHARACTERS = 2**20
LABELS = "label_counts"
# characters of labels that are written at once, in less than a millisecond
SLICE = 2**16


def set_card(info: SupportSetInfo, services: Services) -> dict[str, Any]:
    """Return the description of a version, with the status of its warming."""
    warmth = services.warming.warmth(info.id, info.version)
    return {
        "id": info.id,
        "object": "support_set",
        "name": info.name,
        "version": info.version,
        "latest_version": info.latest_version,
        "created_at": info.created_at,
        "updated_at": info.updated_at,
        "expires_at": info.expires_at,
        "pinned": info.is_pinned,
        "metadata": info.metadata,
        "num_examples": info.num_examples,
        "num_media": info.num_media,
        "bytes": info.num_bytes,
        LABELS: info.label_counts,
        "status": warmth.status,
        "warm": None if warmth.status == "pending" else asdict(warmth),
    }


async def cards_response(infos: Sequence[SupportSetInfo], limit: int, services: Services) -> Response:
    """Return a page of at most `limit` descriptions. Long labels are written as in `card_response`.

    A page with more than `MAX_PAGE_CHARACTERS` of them has one description.
    """
    page = list_page([set_card(info, services) for info in infos], limit)
    if limit > 1 or sum(info.num_label_characters for info in infos[:limit]) <= MAX_PAGE_CHARACTERS:
        return JSONResponse(page)

    def write() -> bytes:
        before, after = msgspec.json.encode({**page, "data": []}).split(b"[]", 1)
        return b"".join((before, b"[", _in_slices(page["data"][0]), b"]", after))

    return WholeResponse(await services.writer.describe(write), media_type=JSON)


async def card_response(info: SupportSetInfo, services: Services, **added: Any) -> Response:
    """Return a response with the description of a version, and added fields.

    Long labels are written in a thread, in which clients take turns, and in slices, between which other threads run.
    """
    card = {**set_card(info, services), **added}
    if info.num_label_characters <= MAX_PAGE_CHARACTERS:
        return JSONResponse(card)
    body = await services.writer.describe(partial(_in_slices, card))
    return WholeResponse(body, media_type=JSON)


async def changed_response(info: SupportSetInfo, services: Services) -> Response:
    """Return a response with the description of a new version, and the ids of the examples in the request."""
    return await card_response(info, services, example_ids=info.example_ids)


def _in_slices(card: Mapping[str, Any]) -> bytes:
    """Return a description with labels in JSON."""
    other_fields = msgspec.json.encode({key: value for key, value in card.items() if key != LABELS})
    before = other_fields.removesuffix(b"}") + b"," + msgspec.json.encode(LABELS) + b":{"
    slices = (part for written in _slices(card[LABELS]) for part in (b",", written))
    next(slices)  # no comma comes before the first
    return b"".join((before, *slices, b"}}"))


def _slices(values: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield the inside of an object in JSON, in parts."""
    part: dict[str, Any] = {}
    num_characters = 0
    for key, value in values.items():
        part[key] = value
        num_characters += len(key)
        if num_characters >= SLICE:
            yield msgspec.json.encode(part)[1:-1]
            part, num_characters = {}, 0
    if part:
        yield msgspec.json.encode(part)[1:-1]
