"""POST /v1/fewshot/completions: shots given or chosen, a query, and the answer with the shots that led to it.

The same path as a completion, once the prompt is assembled. Beside it, a search for the examples most like a query.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import JSONResponse, read_body
from server.api.routes.completions import Ordered, complete
from server.api.routes.support_sets import example_card
from server.api.services import GivenServices, GivenTicket
from server.api.sse import unless_disconnected
from server.api.templated import in_template
from server.fewshot.prompting import assemble
from server.fewshot.retrieval import SimilarityQuery, compared_text
from server.fewshot.selection import Similar
from server.fewshot.shots import read_given
from server.schemas.completions import CompletionFields, read
from server.schemas.fewshot import FewShotFields, SearchRequest
from server.services import Services
from server.store.records import SupportSet

router = APIRouter()


class FewShotCompletionRequest(CompletionFields, FewShotFields):
    pass


@router.post("/v1/fewshot/completions")
async def create_fewshot_completion(request: Request, services: GivenServices, ticket: GivenTicket) -> Response:
    accepted = time.monotonic()
    fields = read(FewShotCompletionRequest, await read_body(request, services.settings))
    services.check_model(fields.model)
    assembled = await unless_disconnected(request.receive, assemble(fields, services, room=fields.max_tokens))
    services.metrics.request_shots.observe(len(assembled.shots))
    told = assembled.told()
    if fields.echo:
        told["prompt"] = services.model.tokenizer.decode(assembled.prompt.encoded.token_ids, skip_special_tokens=False)
    ordered = Ordered(
        prompt=assembled.prompt,
        accepted=accepted,
        lead=assembled.template.lead,
        details=assembled.usage(),
        told={"fewshot": told},
    )
    return await complete(request, services, ticket, in_template(fields, assembled.template, services.model), ordered)


@router.post("/v1/support_sets/{support_set}/search")
async def search_support_set(
    support_set: str, request: Request, services: GivenServices, ticket: GivenTicket
) -> Response:
    fields = read(SearchRequest, await read_body(request, services.settings))
    services.check_model(fields.model)
    return JSONResponse(await unless_disconnected(request.receive, _search(support_set, fields, services)))


async def _search(support_set: str, fields: SearchRequest, services: Services) -> dict[str, Any]:
    found = await services.support_sets.get_version(support_set, fields.version)
    media = (await read_given({"query": fields.query}, services))["query"]
    asked = SimilarityQuery(media=media, text=compared_text(fields.query.question, fields.query.text))
    similar = await services.retrieval.most_similar(found, fields.strategy, asked, fields.k)
    return {
        "object": "list",
        "support_set": found.id,
        "version": found.version,
        "strategy": fields.strategy,
        "data": [_hit(found, one) for one in similar],
    }


def _hit(found: SupportSet, one: Similar) -> dict[str, Any]:
    return {**example_card(found.examples[one.place]), "score": one.score}
