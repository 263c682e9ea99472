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

from server.api.body import JSONResponse, read_body, read_request
from server.api.example_media import read_examples
from server.api.openapi import MEDIA, PROMPT, QUEUE, SUPPORT_SET, describe
from server.api.services import GivenServices, GivenTicket, Services
from server.api.sse import unless_disconnected
from server.errors import (
    DatabaseUnavailable,
    ExampleNotFound,
    IdempotencyConflict,
    InvalidRequest,
    NameTaken,
    TooManyExamples,
    Unavailable,
    VersionConflict,
)
from server.fewshot.prompting import assemble_prefix
from server.fewshot.retrieval import SPACES, SimilarityQuery, compared_text
from server.fewshot.warming import WarmTarget
from server.schemas.base import list_page, read, read_query
from server.schemas.fewshot import SearchRequest
from server.schemas.prompt import stored_media_part
from server.schemas.responses.base import Deleted
from server.schemas.responses.support_sets import (
    ChangedSupportSet,
    SimilarExamples,
    StoredExample,
    StoredExamples,
    SupportSet,
    SupportSets,
    Versions,
)
from server.schemas.support_sets import (
    CreateRequest,
    ExpectedRequest,
    ListExamplesRequest,
    ListSetsRequest,
    ListVersionsRequest,
    PutExamplesRequest,
    RemoveExamplesRequest,
    UpdateRequest,
    VersionRequest,
    WarmRequest,
)
from server.store.records import Example, SupportSetInfo
from server.store.support_sets import IdempotencyKey

router = APIRouter()

CHANGE = (*SUPPORT_SET, VersionConflict)
EXAMPLES = (*MEDIA, *QUEUE, TooManyExamples, IdempotencyConflict, Unavailable)
KEY = ("Idempotency-Key",)

IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


@router.post(
    "/v1/support_sets",
    **describe(
        "Support sets",
        body=CreateRequest,
        response=ChangedSupportSet,
        errors=(*CHANGE, *EXAMPLES, NameTaken),
        headers=KEY,
    ),
)
async def create_support_set(request: Request, services: GivenServices, ticket: GivenTicket) -> Response:
    """Create a support set."""
    body = await read_body(request, services.settings)
    fields = read(CreateRequest, body)
    info = await services.support_sets.create(
        fields.name,
        await read_examples(fields.examples, services.intake),
        expires_at=fields.end(time.time()),
        is_pinned=fields.pinned,
        metadata=fields.metadata,
        idempotency_key=_idempotency_key(request, body),
    )
    return JSONResponse(_put_card(info, services))


@router.get(
    "/v1/support_sets",
    **describe("Support sets", query=ListSetsRequest, response=SupportSets, errors=(DatabaseUnavailable,)),
)
async def list_support_sets(request: Request, services: GivenServices) -> Response:
    """List support sets in the order of their creation."""
    fields = read_query(ListSetsRequest, request.query_params)
    page = await services.support_sets.page(fields.after, fields.limit + 1)
    return JSONResponse(list_page([_card(info, services) for info in page], fields.limit))


@router.get(
    "/v1/support_sets/{support_set}",
    **describe("Support sets", query=VersionRequest, response=SupportSet, errors=SUPPORT_SET),
)
async def show_support_set(support_set: str, request: Request, services: GivenServices) -> Response:
    """Describe the latest or another version of a support set."""
    fields = read_query(VersionRequest, request.query_params)
    return JSONResponse(_card(await services.support_sets.get(support_set, fields.version), services))


@router.patch(
    "/v1/support_sets/{support_set}",
    **describe("Support sets", body=UpdateRequest, response=SupportSet, errors=(*CHANGE, *QUEUE, NameTaken)),
)
async def update_support_set(
    support_set: str, request: Request, services: GivenServices, ticket: GivenTicket
) -> Response:
    """Change the name, the lifetime or the metadata of a support set, or pin it."""
    fields = await read_request(UpdateRequest, request, services)
    changes = fields.changes(time.time())
    info = await services.support_sets.update(support_set, changes, expected_version=fields.expected_version)
    return JSONResponse(_card(info, services))


@router.delete(
    "/v1/support_sets/{support_set}", **describe("Support sets", query=ExpectedRequest, response=Deleted, errors=CHANGE)
)
async def delete_support_set(support_set: str, request: Request, services: GivenServices) -> Response:
    """Delete a support set and the media that nothing else uses."""
    fields = read_query(ExpectedRequest, request.query_params)
    set_id = await services.support_sets.delete(support_set, expected_version=fields.expected_version)
    return JSONResponse({"id": set_id, "object": "support_set", "deleted": True})


@router.get(
    "/v1/support_sets/{support_set}/versions",
    **describe("Support sets", query=ListVersionsRequest, response=Versions, errors=SUPPORT_SET),
)
async def list_versions(support_set: str, request: Request, services: GivenServices) -> Response:
    """List the versions of a support set and what each of them changed."""
    fields = read_query(ListVersionsRequest, request.query_params)
    page = await services.support_sets.versions(support_set, fields.after, fields.limit + 1)
    shown = [{"object": "support_set.version", **asdict(info)} for info in page[: fields.limit]]
    return JSONResponse({"object": "list", "data": shown, "has_more": len(page) > len(shown)})


@router.post(
    "/v1/support_sets/{support_set}/examples",
    **describe(
        "Support sets", body=PutExamplesRequest, response=ChangedSupportSet, errors=(*CHANGE, *EXAMPLES), headers=KEY
    ),
)
async def put_examples(support_set: str, request: Request, services: GivenServices, ticket: GivenTicket) -> Response:
    """Add examples, or replace those with the same ids."""
    body = await read_body(request, services.settings)
    fields = read(PutExamplesRequest, body)
    info = await services.support_sets.put_examples(
        support_set,
        await read_examples(fields.examples, services.intake),
        expected_version=fields.expected_version,
        idempotency_key=_idempotency_key(request, body),
    )
    return JSONResponse(_put_card(info, services))


@router.get(
    "/v1/support_sets/{support_set}/examples",
    **describe("Support sets", query=ListExamplesRequest, response=StoredExamples, errors=SUPPORT_SET),
)
async def list_examples(support_set: str, request: Request, services: GivenServices) -> Response:
    """List the examples of a version in their order."""
    fields = read_query(ListExamplesRequest, request.query_params)
    found = await services.support_sets.get_version(support_set, fields.version)
    start = _place(found.examples, fields.after, found.version) + 1 if fields.after else 0
    shown = [_example_card(example) for example in found.examples[start : start + fields.limit + 1]]
    return JSONResponse({**list_page(shown, fields.limit), "version": found.version})


@router.get(
    "/v1/support_sets/{support_set}/examples/{example_id}",
    **describe("Support sets", query=VersionRequest, response=StoredExample, errors=(*SUPPORT_SET, ExampleNotFound)),
)
async def show_example(support_set: str, example_id: str, request: Request, services: GivenServices) -> Response:
    """Return an example."""
    fields = read_query(VersionRequest, request.query_params)
    found = await services.support_sets.get_version(support_set, fields.version)
    example = next((example for example in found.examples if example.id == example_id), None)
    if example is None:
        raise ExampleNotFound(f"version {found.version} of the support set has no example {example_id[:128]!r}")
    return JSONResponse(_example_card(example))


@router.delete(
    "/v1/support_sets/{support_set}/examples/{example_id}",
    **describe("Support sets", query=ExpectedRequest, response=SupportSet, errors=(*CHANGE, ExampleNotFound)),
)
async def delete_example(support_set: str, example_id: str, request: Request, services: GivenServices) -> Response:
    """Delete an example."""
    expected = read_query(ExpectedRequest, request.query_params).expected_version
    info = await services.support_sets.remove_examples(support_set, [example_id], expected_version=expected)
    return JSONResponse(_card(info, services))


@router.delete(
    "/v1/support_sets/{support_set}/examples",
    **describe("Support sets", query=RemoveExamplesRequest, response=SupportSet, errors=(*CHANGE, ExampleNotFound)),
)
async def delete_examples(support_set: str, request: Request, services: GivenServices) -> Response:
    """Delete several examples, or none if one of them does not exist."""
    fields = read_query(RemoveExamplesRequest, request.query_params)
    expected = fields.expected_version
    info = await services.support_sets.remove_examples(support_set, fields.ids, expected_version=expected)
    return JSONResponse(_card(info, services))


@router.post(
    "/v1/support_sets/{support_set}/warm",
    **describe(
        "Support sets", body=WarmRequest, is_body_required=False, response=SupportSet, errors=(*SUPPORT_SET, *PROMPT)
    ),
)
async def warm_support_set(
    support_set: str, request: Request, services: GivenServices, ticket: GivenTicket
) -> Response:
    """Compute the media, vectors and shots of a version before requests need them.

    The response comes at once or, with `wait`, when the version is warm.
    """
    fields = await read_request(WarmRequest, request, services, empty=b"{}")
    found = await services.support_sets.get_version(support_set, fields.version)
    prefix = None
    if fields.template is not None:
        prefix = await assemble_prefix(found, fields.template, fields.k, services.model, services.shots)
    target = WarmTarget(prefix=prefix, with_texts="text" in SPACES[fields.strategy])
    await services.warming.warm(found, target, wait=fields.wait)
    return JSONResponse(_card(await services.support_sets.get(found.id, found.version), services))


@router.post(
    "/v1/support_sets/{support_set}/search",
    **describe("Support sets", body=SearchRequest, response=SimilarExamples, errors=(*SUPPORT_SET, *PROMPT)),
)
async def search_support_set(
    support_set: str, request: Request, services: GivenServices, ticket: GivenTicket
) -> Response:
    """Return the examples that are most similar to a query."""
    fields = await read_request(SearchRequest, request, services)
    return JSONResponse(await unless_disconnected(request.receive, _search(support_set, fields, services)))


async def _search(name: str, fields: SearchRequest, services: Services) -> dict[str, Any]:
    support_set = await services.support_sets.get_version(name, fields.version)
    media = (await services.shots.read_media({"query": fields.query}))["query"]
    query = SimilarityQuery(media=media, text=compared_text(fields.query.question, fields.query.text))
    similar = await services.shots.retrieval.most_similar(support_set, fields.strategy, query, fields.k)
    return {
        "object": "list",
        "support_set": support_set.id,
        "version": support_set.version,
        "strategy": fields.strategy,
        "data": [{**_example_card(support_set.examples[hit.index]), "score": hit.score} for hit in similar],
    }


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


def _example_card(example: Example) -> dict[str, Any]:
    """Its fields are those of a request, so that it may be sent again."""
    return {
        "id": example.id,
        "object": "support_set.example",
        "media": [stored_media_part(media_id).model_dump() for media_id in example.media],
        "text": example.text,
        "question": example.question,
        "label": example.label,
        "metadata": example.metadata,
    }
