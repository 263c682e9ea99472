"""/v1/support_sets: named, versioned sets of worked examples that few-shot requests take their shots from.

A set is named in the path by its id or its name. Every change of its examples makes a version; reads tell which one.
"""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import JSONResponse, read_body
from server.api.example_media import read_examples
from server.api.services import GivenServices, GivenTicket
from server.errors import ExampleNotFound, InvalidRequest
from server.fewshot.retrieval import SPACES
from server.fewshot.warm_prefix import prefix_of
from server.fewshot.warming import WarmTarget
from server.media.source import kind_of
from server.schemas.completions import read, read_query
from server.schemas.support_sets import (
    CreateRequest,
    ExpectedRequest,
    ListExamplesRequest,
    ListRequest,
    ListVersionsRequest,
    PutExamplesRequest,
    RemoveExamplesRequest,
    UpdateRequest,
    VersionRequest,
    WarmRequest,
)
from server.services import Services
from server.store.idempotency import IdempotencyKey
from server.store.records import Example, SupportSetInfo

router = APIRouter()

IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


@router.post("/v1/support_sets")
async def create_support_set(request: Request, services: GivenServices, ticket: GivenTicket) -> Response:
    body = await read_body(request, services.settings)
    fields = read(CreateRequest, body)
    info = await services.support_sets.create(
        fields.name,
        await read_examples(fields.examples, services),
        expires_at=fields.end(time.time()),
        is_pinned=fields.pinned,
        metadata=fields.metadata,
        idempotency_key=_idempotency_key(request, body),
    )
    return JSONResponse(_put_card(info, services))


@router.get("/v1/support_sets")
async def list_support_sets(request: Request, services: GivenServices) -> Response:
    """In the order of their creation."""
    fields = read_query(ListRequest, request.query_params)
    page = await services.support_sets.page(fields.after, fields.limit + 1)
    return JSONResponse(_listed([_card(info, services) for info in page], fields.limit))


@router.get("/v1/support_sets/{support_set}")
async def show_support_set(support_set: str, request: Request, services: GivenServices) -> Response:
    fields = read_query(VersionRequest, request.query_params)
    return JSONResponse(_card(await services.support_sets.get(support_set, fields.version), services))


@router.patch("/v1/support_sets/{support_set}")
async def update_support_set(
    support_set: str, request: Request, services: GivenServices, ticket: GivenTicket
) -> Response:
    fields = read(UpdateRequest, await read_body(request, services.settings))
    changes = fields.changes(time.time())
    info = await services.support_sets.update(support_set, changes, expected_version=fields.expected_version)
    return JSONResponse(_card(info, services))


@router.delete("/v1/support_sets/{support_set}")
async def delete_support_set(support_set: str, request: Request, services: GivenServices) -> Response:
    fields = read_query(ExpectedRequest, request.query_params)
    set_id = await services.support_sets.delete(support_set, expected_version=fields.expected_version)
    return JSONResponse({"id": set_id, "object": "support_set", "deleted": True})


@router.get("/v1/support_sets/{support_set}/versions")
async def list_versions(support_set: str, request: Request, services: GivenServices) -> Response:
    fields = read_query(ListVersionsRequest, request.query_params)
    page = await services.support_sets.versions(support_set, fields.after, fields.limit + 1)
    shown = [{"object": "support_set.version", **asdict(info)} for info in page[: fields.limit]]
    return JSONResponse({"object": "list", "data": shown, "has_more": len(page) > len(shown)})


@router.post("/v1/support_sets/{support_set}/examples")
async def put_examples(support_set: str, request: Request, services: GivenServices, ticket: GivenTicket) -> Response:
    body = await read_body(request, services.settings)
    fields = read(PutExamplesRequest, body)
    info = await services.support_sets.put_examples(
        support_set,
        await read_examples(fields.examples, services),
        expected_version=fields.expected_version,
        idempotency_key=_idempotency_key(request, body),
    )
    return JSONResponse(_put_card(info, services))


@router.get("/v1/support_sets/{support_set}/examples")
async def list_examples(support_set: str, request: Request, services: GivenServices) -> Response:
    """In the order of the set."""
    fields = read_query(ListExamplesRequest, request.query_params)
    found = await services.support_sets.get_version(support_set, fields.version)
    start = _place(found.examples, fields.after, found.version) + 1 if fields.after else 0
    shown = [example_card(example) for example in found.examples[start : start + fields.limit + 1]]
    return JSONResponse({**_listed(shown, fields.limit), "version": found.version})


@router.get("/v1/support_sets/{support_set}/examples/{example_id}")
async def show_example(support_set: str, example_id: str, request: Request, services: GivenServices) -> Response:
    fields = read_query(VersionRequest, request.query_params)
    found = await services.support_sets.get_version(support_set, fields.version)
    example = next((example for example in found.examples if example.id == example_id), None)
    if example is None:
        raise ExampleNotFound(f"version {found.version} of the support set has no example {example_id[:128]!r}")
    return JSONResponse(example_card(example))


@router.delete("/v1/support_sets/{support_set}/examples/{example_id}")
async def delete_example(support_set: str, example_id: str, request: Request, services: GivenServices) -> Response:
    expected = read_query(ExpectedRequest, request.query_params).expected_version
    info = await services.support_sets.remove_examples(support_set, [example_id], expected_version=expected)
    return JSONResponse(_card(info, services))


@router.delete("/v1/support_sets/{support_set}/examples")
async def delete_examples(support_set: str, request: Request, services: GivenServices) -> Response:
    fields = read_query(RemoveExamplesRequest, request.query_params)
    expected = fields.expected_version
    info = await services.support_sets.remove_examples(support_set, fields.ids, expected_version=expected)
    return JSONResponse(_card(info, services))


@router.post("/v1/support_sets/{support_set}/warm")
async def warm_support_set(
    support_set: str, request: Request, services: GivenServices, ticket: GivenTicket
) -> Response:
    """Comes back at once, or with `wait` when the set is warm."""
    fields = read(WarmRequest, await read_body(request, services.settings) or b"{}")
    found = await services.support_sets.get_version(support_set, fields.version)
    prefix = None if fields.template is None else await prefix_of(found, fields.template, fields.k, services)
    wish = WarmTarget(prefix=prefix, with_texts="text" in SPACES[fields.strategy])
    await services.warming.warm(found, wish, wait=fields.wait)
    return JSONResponse(_card(await services.support_sets.get(found.id, found.version), services))


def _idempotency_key(request: Request, body: bytes) -> IdempotencyKey | None:
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if IDEMPOTENCY_KEY.fullmatch(key) is None:
        message = "an Idempotency-Key has 1 to 255 printable characters of ASCII"
        raise InvalidRequest(message, param="Idempotency-Key")
    return IdempotencyKey(key, hashlib.sha256(body).hexdigest())


def _place(examples: tuple[Example, ...], example_id: str, version: int) -> int:
    place = next((place for place, example in enumerate(examples) if example.id == example_id), None)
    if place is None:
        raise InvalidRequest(f"version {version} has no example {example_id!r} to go on behind", param="after")
    return place


def _listed(cards: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """`cards`: one more than asked for, where there is one."""
    shown = cards[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(cards) > len(shown),
    }


def _put_card(info: SupportSetInfo, services: Services) -> dict[str, Any]:
    return {**_card(info, services), "example_ids": info.example_ids}


def _card(info: SupportSetInfo, services: Services) -> dict[str, Any]:
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
        "label_counts": info.label_counts,
        "status": warmth.status,
        "warm": None if warmth.status == "pending" else asdict(warmth),
    }


def example_card(example: Example) -> dict[str, Any]:
    """Its fields are those of a request, so that it may be sent again."""
    return {
        "id": example.id,
        "object": "support_set.example",
        "media": [_media_part(name) for name in example.media],
        "text": example.text,
        "question": example.question,
        "label": example.label,
        "metadata": example.metadata,
    }


def _media_part(name: str) -> dict[str, str]:
    kind = f"{kind_of(name)}_id"
    return {"type": kind, kind: name}
