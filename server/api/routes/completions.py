"""Routes that complete a prompt: `/v1/completions` in OpenAI's shape, `/v1/fewshot/completions` after shots."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.answers import CompletionShape, respond
from server.api.body import read_request
from server.api.generation import completion_requests
from server.api.openapi import PROMPT, SUPPORT_SET_ERRORS, describe
from server.api.services import GivenRecord, GivenServices, Services
from server.api.sse import unless_disconnected
from server.fewshot.prompting import assemble, fewshot_report, read_question, record_shots
from server.prompt import prepare_prompts
from server.schemas.fewshot import FewShotCompletionRequest
from server.schemas.generation import CompletionRequest
from server.schemas.responses.completions import Completion, CompletionChunk, FewShotCompletion, FewShotCompletionChunk
from server.telemetry.request_record import RequestRecord

router = APIRouter()


@router.post(
    "/v1/completions",
    **describe("Completions", body=CompletionRequest, response=Completion, chunk=CompletionChunk, errors=PROMPT),
)
async def create_completion(request: Request, services: GivenServices, record: GivenRecord) -> Response:
    """Continue one or more prompts."""
    fields = await read_request(CompletionRequest, request, services)
    work = _complete(fields, record, services.with_salt(fields.cache_salt))
    return await unless_disconnected(request.receive, work)


async def _complete(fields: CompletionRequest, record: RequestRecord, services: Services) -> Response:
    prompts = await prepare_prompts(fields.prompt, services.model, services.intake, fields.shots_attend)
    generations = completion_requests(fields, prompts, services.model)
    return await respond(services, record, generations, CompletionShape(fields))


@router.post(
    "/v1/fewshot/completions",
    **describe(
        "Few-shot",
        body=FewShotCompletionRequest,
        response=FewShotCompletion,
        chunk=FewShotCompletionChunk,
        errors=(*PROMPT, *SUPPORT_SET_ERRORS),
    ),
)
async def create_fewshot_completion(request: Request, services: GivenServices, record: GivenRecord) -> Response:
    """Answer a query after shots, which are in the request or selected from a support set."""
    fields = await read_request(FewShotCompletionRequest, request, services)
    work = _complete_fewshot(fields, record, services.with_salt(fields.cache_salt))
    return await unless_disconnected(request.receive, work)


async def _complete_fewshot(fields: FewShotCompletionRequest, record: RequestRecord, services: Services) -> Response:
    model = services.model
    question = (await read_question(fields, model, services.shots)).with_each_label()
    assembled = await assemble(question, model, services.shots, room=fields.max_tokens)
    record_shots(question, assembled, record)
    fewshot = fewshot_report(question, assembled)
    if fields.echo:
        token_ids = assembled.prompt.encoded.token_ids
        fewshot["prompt"] = model.tokenizer.decode(token_ids, skip_special_tokens=False)
    generations = completion_requests(fields, [assembled.prompt], model, template=question.template)
    return await respond(services, record, generations, CompletionShape(fields, {"fewshot": fewshot}))
