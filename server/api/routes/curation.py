"""Routes for curating a support set: diagnostics of its examples, and suggestions of images to label next."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import read_query, read_request
from server.api.examples import read_groups
from server.api.openapi import PROMPT, SUPPORT_SET_ERRORS, describe
from server.api.responses import JSONResponse
from server.api.services import GivenRecord, GivenServices, Services
from server.api.sse import unless_disconnected
from server.errors import ClientOverShare, Overloaded, ShuttingDown
from server.media.source import EncodedMedia
from server.quality.curation import check_diagnosable, check_number
from server.quality.diagnostics import Diagnosis
from server.quality.measures import wilson
from server.quality.suggestion import Suggestion
from server.schemas.responses import curation as responses
from server.schemas.stored import DiagnosticsRequest, SuggestRequest
from server.store.records import SupportSet
from server.telemetry.request_record import RequestRecord

router = APIRouter()

# errors of a request without a body while it waits in the queue
WAITING = (Overloaded, ClientOverShare, ShuttingDown)


@router.get(
    "/v1/support_sets/{support_set}/diagnostics",
    **describe(
        "Support sets",
        query=DiagnosticsRequest,
        response=responses.Diagnostics,
        errors=(*SUPPORT_SET_ERRORS, *PROMPT, *WAITING),
    ),
)
async def diagnose_support_set(
    support_set: str, request: Request, services: GivenServices, record: GivenRecord
) -> Response:
    """List examples that look mislabelled, make others wrong, are duplicates, or contradict each other."""
    fields = read_query(DiagnosticsRequest, request)
    request.state.ticket.wait()
    return JSONResponse(await unless_disconnected(request.receive, _diagnose(support_set, fields, record, services)))


async def _diagnose(name: str, fields: DiagnosticsRequest, record: RequestRecord, services: Services) -> dict[str, Any]:
    support_set = await services.support_sets.get_version(name, fields.version)
    check_diagnosable(support_set)  # refused requests are not counted as finished
    with record:
        diagnosis = await services.curation.diagnose(support_set)
        record.begun(0)
    return {
        "object": "support_set.diagnostics",
        "support_set": support_set.id,
        "version": support_set.version,
        **_report(diagnosis, fields.limit),
    }


def _report(diagnosis: Diagnosis, limit: int) -> dict[str, Any]:
    """Return the fields of a diagnosis, with the first entries of each list."""
    judged, right = diagnosis.num_judged, diagnosis.num_right
    lists = ("mislabelled", "harmful", "redundant", "conflicting", "confused")
    return {
        "examples": diagnosis.num_examples,
        "labels": len(diagnosis.labels),
        "unlabelled": diagnosis.num_unlabelled,
        "without_media": diagnosis.num_without_media,
        "left_out": {
            "queries": judged,
            "accuracy": right / judged if judged else None,
            "accuracy_interval": list(wilson(right, judged)) if judged else None,
        },
        "thresholds": {"similarity": diagnosis.duplicate_similarity},
        "single": {"count": len(diagnosis.single), "data": diagnosis.single[:limit]},
        **{
            name: {"count": len(entries), "data": [asdict(entry) for entry in entries[:limit]]}
            for name, entries in ((name, getattr(diagnosis, name)) for name in lists)
        },
    }


@router.post(
    "/v1/support_sets/{support_set}/suggest",
    **describe(
        "Support sets", body=SuggestRequest, response=responses.Suggestions, errors=(*SUPPORT_SET_ERRORS, *PROMPT)
    ),
)
async def suggest_media(support_set: str, request: Request, services: GivenServices, record: GivenRecord) -> Response:
    """Suggest which images of a pool to label next."""
    fields = await read_request(SuggestRequest, request, services)
    return JSONResponse(await unless_disconnected(request.receive, _suggest(support_set, fields, record, services)))


async def _suggest(name: str, fields: SuggestRequest, record: RequestRecord, services: Services) -> dict[str, Any]:
    support_set = await services.support_sets.get_version(name, fields.version)
    check_number(support_set)
    pool = await read_groups(fields.pool, "pool", services.intake)
    known = _known(support_set, pool)
    repeated = _repeated(pool, known)
    open_indices = [index for index in range(len(pool)) if index not in known and index not in repeated]
    record.begin_prompt(0, [item.digest for index in open_indices for item in pool[index]])
    with record:
        suggestions = await services.curation.suggest(
            support_set, [pool[index] for index in open_indices], fields.count
        )
        record.begun(0)
    return {
        "object": "list",
        "support_set": support_set.id,
        "version": support_set.version,
        "method": suggestions.method,
        "data": [{"index": open_indices[entry.index], **_reasons(entry)} for entry in suggestions.entries],
        "known": [{"index": index, "example": example} for index, example in known.items()],
        "repeated": [{"index": index, "first_index": first} for index, first in repeated.items()],
    }


def _known(support_set: SupportSet, pool: Sequence[Sequence[EncodedMedia]]) -> dict[int, str]:
    """Return the ids of the examples that show the same media, by position in the pool."""
    by_media = {frozenset(example.media): example.id for example in reversed(support_set.examples)}
    names = map(_media_ids, pool)
    return {index: by_media[media] for index, media in enumerate(names) if media in by_media}


def _repeated(pool: Sequence[Sequence[EncodedMedia]], known: Container[int]) -> dict[int, int]:
    """Return the position of the first of equal entries, by the positions of the others, without known ones."""
    first: dict[frozenset[str], int] = {}
    positions = [first.setdefault(_media_ids(media), index) for index, media in enumerate(pool)]
    return {index: position for index, position in enumerate(positions) if position != index and index not in known}


def _media_ids(media: Sequence[EncodedMedia]) -> frozenset[str]:
    return frozenset(item.id for item in media)


def _reasons(suggestion: Suggestion) -> dict[str, Any]:
    names = ("margin", "similarity", "gain")
    return {
        "labels": [asdict(label) for label in suggestion.labels],
        "reason": {name: getattr(suggestion, name) for name in names},
    }
