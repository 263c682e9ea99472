"""POST /v1/completions in OpenAI's shape, for prompts that may hold media."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.answers import CompletionShape, respond
from server.api.body import read_request
from server.api.generation import completion_request
from server.api.openapi import PROMPT, describe
from server.api.services import GivenRecord, GivenServices
from server.prompt import prepare_prompt
from server.schemas.generation import CompletionRequest
from server.schemas.responses.completions import Completion, CompletionChunk

router = APIRouter()


@router.post(
    "/v1/completions",
    **describe("Completions", body=CompletionRequest, response=Completion, chunk=CompletionChunk, errors=PROMPT),
)
async def create_completion(request: Request, services: GivenServices, record: GivenRecord) -> Response:
    """Continue a prompt."""
    fields = await read_request(CompletionRequest, request, services)
    prompt = await prepare_prompt(fields.prompt, services.model, services.intake)
    generation = completion_request(fields, prompt, services.model)
    return await respond(request, services, record, fields, generation, CompletionShape(fields))
