"""POST /v1/fewshot/completions: shots given or chosen, a query, and the answer with the shots that led to it.

The same path as a completion, once the prompt is assembled. Beside it, a search for the examples most like a query.
"""

from __future__ import annotations

import re
import time
from typing import Any, TypeVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from model.config import PromptConfig
from server.api.body import JSONResponse, read_body
from server.api.completions import Ordered, complete
from server.api.schemas import CompletionFields, GenerationFields, StructuredOutputs, read
from server.api.schemas_fewshot import FewShotFields, SearchRequest
from server.api.services import GivenServices, GivenTicket, Services
from server.api.sse import unless_disconnected
from server.fewshot.examples import Example, SupportSet
from server.fewshot.prompting import assemble
from server.fewshot.retrieval import Asked, compared_text
from server.fewshot.selection import Similar
from server.fewshot.shots import read_given
from server.fewshot.templates import Template
from server.served_model import ServedModel

FieldsType = TypeVar("FieldsType", bound=GenerationFields)

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


def in_template(fields: FieldsType, template: Template, model: ServedModel) -> FieldsType:
    """The request as the template has it: it ends where a shot ends, and forms begin with what leads to an answer."""
    changes: dict[str, Any] = {}
    if template.end and "stop" not in fields.model_fields_set:
        changes["stop"] = [template.end]
    if not template.end and not _ends_sequence(model.config.prompt):
        end_id = model.tokenizer.id_of(model.config.prompt.end_of_chunk)
        changes["stop_token_ids"] = [*fields.stop_token_ids, end_id]
    if template.lead:
        changes["structured_outputs"] = _led(fields.structured_outputs, template.lead)
    return fields.model_copy(update=changes)


def _ends_sequence(prompt: PromptConfig) -> bool:
    return prompt.end_of_chunk in prompt.eos


def _led(form: StructuredOutputs, lead: str) -> StructuredOutputs:
    """JSON may begin with spaces as it is."""
    if form.choice:
        return form.model_copy(update={"choice": [lead + choice for choice in form.choice]})
    if form.regex:
        return form.model_copy(update={"regex": f"{re.escape(lead)}(?:{form.regex})"})
    return form


@router.post("/v1/support_sets/{set_id}/search")
async def search_support_set(set_id: str, request: Request, services: GivenServices, ticket: GivenTicket) -> Response:
    fields = read(SearchRequest, await read_body(request, services.settings))
    services.check_model(fields.model)
    return JSONResponse(await unless_disconnected(request.receive, _search(set_id, fields, services)))


async def _search(set_id: str, fields: SearchRequest, services: Services) -> dict[str, Any]:
    found = await services.support_sets.get_version(set_id, fields.version)
    media = (await read_given({"query": fields.query}, services))["query"]
    asked = Asked(media=media, text=compared_text(fields.query.question, fields.query.text))
    similar = await services.retrieval.most_similar(found, fields.strategy, asked, fields.k)
    return {
        "object": "list",
        "support_set": found.id,
        "version": found.version,
        "strategy": fields.strategy,
        "data": [_hit(found, one) for one in similar],
    }


def _hit(found: SupportSet, one: Similar) -> dict[str, Any]:
    example: Example = found.examples[one.place]
    return {
        "id": example.id,
        "score": one.score,
        "media": list(example.media),
        "text": example.text,
        "label": example.label,
        "question": example.question,
        "metadata": example.metadata,
    }
