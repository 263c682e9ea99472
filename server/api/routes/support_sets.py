"""Routes of `/v1/support_sets`: named, versioned sets of examples from which few-shot requests take their shots.

A path contains the id or the name of a set. Every change of its examples creates a version; responses contain the version.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate, islice, takewhile
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import read_json, read_query, read_request
from server.api.examples import read_examples
from server.api.openapi import MEDIA, PROMPT, SUPPORT_SET_ERRORS, describe
from server.api.responses import JSONResponse
from server.api.services import GivenRecord, GivenServices, Services
from server.api.set_cards import MAX_PAGE_CHARACTERS, card_response, cards_response, changed_response
from server.api.sse import unless_disconnected
from server.errors import (
    DatabaseUnavailable,
    ExampleNotFound,
    IdempotencyConflict,
    InvalidRequest,
    NameTaken,
    TooManyExamples,
    TooManySupportSets,
    Unavailable,
    VersionConflict,
)
from server.fewshot.prompting import assemble_prefix, assemble_shots
from server.fewshot.retrieval import SPACES, SimilarityQuery, check_comparable, compared_text
from server.fewshot.warming import WarmTarget
from server.limits.admission import Ticket
from server.prompt import PreparedPrompt, encode_text
from server.schemas.base import list_page
from server.schemas.fewshot import SearchRequest
from server.schemas.prompt import stored_media_fields
from server.schemas.responses import stored as responses
from server.schemas.responses.base import Deleted
from server.schemas.stored import (
    CreateRequest,
    ExampleFields,
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
from server.store.records import NO_METADATA, Example, NewExample, SupportSet, SupportSetInfo
from server.store.support_sets import IdempotencyKey
from server.telemetry.request_record import RequestRecord

router = APIRouter()

CHANGE = (*SUPPORT_SET_ERRORS, VersionConflict)
EXAMPLES = (*MEDIA, TooManyExamples, IdempotencyConflict, Unavailable)
CREATE = (*CHANGE, *EXAMPLES, NameTaken, TooManySupportSets)
KEY = ("Idempotency-Key",)

IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


@router.post(
    "/v1/support_sets",
    **describe(
        "Support sets",
        body=CreateRequest,
        response=responses.ChangedSupportSet,
        errors=CREATE,
        headers=KEY,
    ),
)
async def create_support_set(request: Request, services: GivenServices) -> Response:
    """Create a support set."""
    fields, body = await read_json(CreateRequest, request, services)
    store = partial(
        services.support_sets.create,
        fields.name,
        expires_at=fields.end(time.time()),
        is_pinned=fields.pinned,
        metadata=fields.metadata,
        idempotency_key=await asyncio.to_thread(idempotency_key, request, body),
        max_sets=request.state.caller.limits.support_sets,
    )
    return await _store(fields.examples, store, request, services)


@router.get(
    "/v1/support_sets",
    **describe("Support sets", query=ListSetsRequest, response=responses.SupportSets, errors=(DatabaseUnavailable,)),
)
async def list_support_sets(request: Request, services: GivenServices) -> Response:
    """List support sets in the order of their creation."""
    fields = read_query(ListSetsRequest, request)
    page = await services.support_sets.page(fields.after, fields.limit + 1, MAX_PAGE_CHARACTERS)
    limit = _num_shown((info.num_label_characters for info in page), fields.limit)
    return await cards_response(page, limit, services)


@router.get(
    "/v1/support_sets/{support_set}",
    **describe("Support sets", query=VersionRequest, response=responses.SupportSet, errors=SUPPORT_SET_ERRORS),
)
async def show_support_set(support_set: str, request: Request, services: GivenServices) -> Response:
    """Describe a version of a support set, by default the latest."""
    fields = read_query(VersionRequest, request)
    return await card_response(await services.support_sets.get(support_set, fields.version), services)


@router.patch(
    "/v1/support_sets/{support_set}",
    **describe("Support sets", body=UpdateRequest, response=responses.SupportSet, errors=(*CHANGE, NameTaken)),
)
async def update_support_set(support_set: str, request: Request, services: GivenServices) -> Response:
    """Change the name, expiry, pinning or metadata of a support set."""
    fields = await read_request(UpdateRequest, request, services)
    changes = fields.changes(time.time())
    info = await services.support_sets.update(support_set, changes, expected_version=fields.expected_version)
    return await card_response(info, services)


@router.delete(
    "/v1/support_sets/{support_set}", **describe("Support sets", query=ExpectedRequest, response=Deleted, errors=CHANGE)
)
async def delete_support_set(support_set: str, request: Request, services: GivenServices) -> Response:
    """Delete a support set, and its media that nothing else uses."""
    fields = read_query(ExpectedRequest, request)
    set_id = await services.support_sets.delete(support_set, expected_version=fields.expected_version)
    services.warming.end(set_id)
    return JSONResponse({"id": set_id, "object": "support_set", "deleted": True})


@router.get(
    "/v1/support_sets/{support_set}/versions",
    **describe("Support sets", query=ListVersionsRequest, response=responses.Versions, errors=SUPPORT_SET_ERRORS),
)
async def list_versions(support_set: str, request: Request, services: GivenServices) -> Response:
    """List the versions of a support set and what each of them changed."""
    fields = read_query(ListVersionsRequest, request)
    page = await services.support_sets.versions(support_set, fields.after, fields.limit + 1)
    versions = [{"object": "support_set.version", **info._asdict()} for info in page[: fields.limit]]
    return JSONResponse({"object": "list", "data": versions, "has_more": len(page) > len(versions)})


@router.post(
    "/v1/support_sets/{support_set}/examples",
    **describe(
        "Support sets",
        body=PutExamplesRequest,
        response=responses.ChangedSupportSet,
        errors=(*CHANGE, *EXAMPLES),
        headers=KEY,
    ),
)
async def put_examples(support_set: str, request: Request, services: GivenServices) -> Response:
    """Add examples, or replace those with the same ids."""
    fields, body = await read_json(PutExamplesRequest, request, services)
    store = partial(
        services.support_sets.put_examples,
        support_set,
        expected_version=fields.expected_version,
        idempotency_key=await asyncio.to_thread(idempotency_key, request, body),
    )
    return await _store(fields.examples, store, request, services)


@router.get(
    "/v1/support_sets/{support_set}/examples",
    **describe("Support sets", query=ListExamplesRequest, response=responses.StoredExamples, errors=SUPPORT_SET_ERRORS),
)
async def list_examples(support_set: str, request: Request, services: GivenServices) -> Response:
    """List the examples of a version in the order of the set."""
    fields = read_query(ListExamplesRequest, request)
    version = await services.support_sets.get_version(support_set, fields.version)
    start = _index(version, fields.after) + 1 if fields.after else 0
    examples = version.examples[start : start + fields.limit + 1]
    limit = _num_shown(map(_length, examples), fields.limit)
    cards = [_example_card(example) for example in examples[: limit + 1]]
    return JSONResponse({**list_page(cards, limit), "version": version.version})


@router.get(
    "/v1/support_sets/{support_set}/examples/{example_id}",
    **describe(
        "Support sets",
        query=VersionRequest,
        response=responses.StoredExample,
        errors=(*SUPPORT_SET_ERRORS, ExampleNotFound),
    ),
)
async def show_example(support_set: str, example_id: str, request: Request, services: GivenServices) -> Response:
    """Return an example."""
    fields = read_query(VersionRequest, request)
    version = await services.support_sets.get_version(support_set, fields.version)
    example = next((example for example in version.examples if example.id == example_id), None)
    if example is None:
        raise ExampleNotFound(f"version {version.version} of the support set has no example {example_id[:128]!r}")
    return JSONResponse(_example_card(example))


@router.delete(
    "/v1/support_sets/{support_set}/examples/{example_id}",
    **describe("Support sets", query=ExpectedRequest, response=responses.SupportSet, errors=(*CHANGE, ExampleNotFound)),
)
async def delete_example(support_set: str, example_id: str, request: Request, services: GivenServices) -> Response:
    """Delete an example."""
    expected = read_query(ExpectedRequest, request).expected_version
    info = await services.support_sets.remove_examples(support_set, [example_id], expected_version=expected)
    return await card_response(info, services)


@router.delete(
    "/v1/support_sets/{support_set}/examples",
    **describe(
        "Support sets", query=RemoveExamplesRequest, response=responses.SupportSet, errors=(*CHANGE, ExampleNotFound)
    ),
)
async def delete_examples(support_set: str, request: Request, services: GivenServices) -> Response:
    """Delete several examples, or none if one of them does not exist."""
    fields = read_query(RemoveExamplesRequest, request)
    expected = fields.expected_version
    info = await services.support_sets.remove_examples(support_set, fields.ids, expected_version=expected)
    return await card_response(info, services)


@router.post(
    "/v1/support_sets/{support_set}/warm",
    **describe(
        "Support sets",
        body=WarmRequest,
        is_body_required=False,
        response=responses.SupportSet,
        errors=(*SUPPORT_SET_ERRORS, *PROMPT),
    ),
)
async def warm_support_set(support_set: str, request: Request, services: GivenServices) -> Response:
    """Compute the media, vectors and shots of a version in advance.

    The response is sent at once or, with `wait`, when the warming has ended.
    """
    fields = await read_request(WarmRequest, request, services, empty=b"{}")
    ticket: Ticket = request.state.ticket
    version = await unless_disconnected(request.receive, _warm(support_set, fields, ticket, services))
    return await card_response(await services.support_sets.get(version.id, version.version), services)


async def _warm(name: str, fields: WarmRequest, ticket: Ticket, services: Services) -> SupportSet:
    """Build the prompts to warm, start warming, and wait for its end if requested. Return the version."""
    # to build prompts may take long, so a request that builds some takes a slot from its beginning
    with nullcontext() if fields.template is None else services.warming.slots.hold(ticket.client):
        version = await services.support_sets.get_version(name, fields.version)
        prompts = await _prompts_to_warm(version, fields, services)
    target = WarmTarget(prompts=tuple(prompts), with_texts="text" in SPACES[fields.strategy])
    ticket.started()  # from now on, it waits for the warming, and not to begin
    await services.warming.warm(version, target, requester=ticket.client, wait=fields.wait)
    return version


async def _prompts_to_warm(version: SupportSet, fields: WarmRequest, services: Services) -> Sequence[PreparedPrompt]:
    """Return a prompt per shot for shots that attend alone, otherwise one of the first `k` shots; none without template."""
    if (template := fields.template) is None:
        return ()
    if fields.shots_attend == "alone":
        return await assemble_shots(version, template, fields.k, services.model, services.shots)
    return [await assemble_prefix(version, template, fields.k, services.model, services.shots)]


@router.post(
    "/v1/support_sets/{support_set}/search",
    **describe(
        "Support sets", body=SearchRequest, response=responses.SimilarExamples, errors=(*SUPPORT_SET_ERRORS, *PROMPT)
    ),
)
async def search_support_set(
    support_set: str, request: Request, services: GivenServices, record: GivenRecord
) -> Response:
    """Return the examples that are most similar to a query."""
    fields = await read_request(SearchRequest, request, services)
    return JSONResponse(await unless_disconnected(request.receive, _search(support_set, fields, record, services)))


async def _search(name: str, fields: SearchRequest, record: RequestRecord, services: Services) -> dict[str, Any]:
    support_set = await services.support_sets.get_version(name, fields.version)
    media = (await services.shots.read_media({"query": fields.query}))["query"]
    query = SimilarityQuery(media=media, text=compared_text(fields.query.question, fields.query.text))
    check_comparable(support_set, fields.strategy, query)  # refused requests are not counted as finished
    num_tokens = 0
    if "text" in SPACES[fields.strategy]:
        num_tokens = len(await services.model.tokenize(encode_text, query.text, services.model, "query"))
    record.begin_prompt(num_tokens, [item.digest for item in media])
    with record:
        similar = await services.shots.retrieval.most_similar(support_set, fields.strategy, query, fields.k)
        record.begun(record.prompt_tokens)
    limit = _num_shown((_length(support_set.examples[hit.index]) for hit in similar), len(similar))
    cards = [{**_example_card(support_set.examples[hit.index]), "score": hit.score} for hit in similar[:limit]]
    return {
        "object": "list",
        "support_set": support_set.id,
        "version": support_set.version,
        "strategy": fields.strategy,
        "data": cards,
        "examples_left_out": len(similar) - len(cards),
    }


async def _store(
    examples: Sequence[ExampleFields],
    store: Callable[[list[NewExample]], Coroutine[Any, Any, SupportSetInfo]],
    request: Request,
    services: Services,
) -> Response:
    """Read the media of new examples and store the version, unless the client disconnects before it is written."""
    services.support_sets.check_num_examples(len(examples))

    async def work() -> SupportSetInfo:
        return await store(await read_examples(examples, services.intake))

    return await changed_response(await unless_disconnected(request.receive, work()), services)


def idempotency_key(request: Request, content: bytes) -> IdempotencyKey | None:
    """Return the key of a request; `content` is its body, or other bytes that identify it. Raises `InvalidRequest`."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if IDEMPOTENCY_KEY.fullmatch(key) is None:
        message = "an Idempotency-Key must have 1 to 255 ASCII characters without spaces and control characters"
        raise InvalidRequest(message, param="Idempotency-Key")
    return IdempotencyKey(key, hashlib.sha256(content).hexdigest())


def _index(version: SupportSet, example_id: str) -> int:
    """Return the index of an example. Raises `InvalidRequest` if it is not in the version."""
    index = next((index for index, example in enumerate(version.examples) if example.id == example_id), None)
    if index is None:
        raise InvalidRequest(
            f"version {version.version} has no example {example_id!r} to continue after", param="after"
        )
    return index


def _num_shown(lengths: Iterable[int], limit: int) -> int:
    """Return how many entries with texts of these lengths a page shows: at least one, at most `limit`."""
    totals = accumulate(islice(lengths, limit))
    return max(sum(1 for _ in takewhile(lambda total: total <= MAX_PAGE_CHARACTERS, totals)), 1)


def _length(example: Example) -> int:
    """Return the number of characters in the texts and the metadata of an example."""
    texts = (example.text, example.question, example.label, example.metadata_json)
    return sum(map(len, texts)) - len(NO_METADATA)


def _example_card(example: Example) -> dict[str, Any]:
    """Return the example with the fields of a request, so that it can be sent again."""
    return {
        "id": example.id,
        "object": "support_set.example",
        "media": list(map(stored_media_fields, example.media)),
        "text": example.text,
        "question": example.question,
        "label": example.label,
        "metadata": msgspec.Raw(example.metadata_json),
    }
