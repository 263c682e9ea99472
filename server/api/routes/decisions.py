"""POST /v1/decisions in OpenAI's shape: questions about one input, answered as `/v1/classify` answers a query.

A few questions of a request are answered concurrently, but only one at a time by likeness. So a request holds only a few
prompts and one fitted method in memory.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import read_request
from server.api.openapi import PROMPT, SUPPORT_SET_ERRORS, describe
from server.api.responses import JSONResponse, response_head
from server.api.services import GivenRecord, GivenServices, Services
from server.api.sse import unless_disconnected
from server.concurrency import run_concurrently
from server.errors import ContextLengthExceeded
from server.fewshot.classification import weigh
from server.fewshot.decisions import Decision, read_decisions
from server.fewshot.evidence import PreparedQuestion, gather, prepare_question
from server.fewshot.methods import IN_CONTEXT, METHODS
from server.fewshot.prompting import record_shots
from server.schemas.decisions import YES, ChoiceQuestion, DecisionQuestion, DecisionRequest, ScoreQuestion
from server.schemas.responses.completions import WeighedCandidate
from server.schemas.responses.decisions import Decision as DecisionResponse
from server.telemetry.request_record import RequestRecord

# maximum questions of one request whose prompts are in the engine or being written; a question with several orders of its
# shots counts once for each order
MAX_CONCURRENT = 32

router = APIRouter()


@router.post(
    "/v1/decisions",
    **describe("Few-shot", body=DecisionRequest, response=DecisionResponse, errors=(*PROMPT, *SUPPORT_SET_ERRORS)),
)
async def create_decision(request: Request, services: GivenServices, record: GivenRecord) -> Response:
    """Answer questions about an input with probabilities: predicates, choices and scores."""
    fields = await read_request(DecisionRequest, request, services)
    work = _decide(fields, record, services.with_salt(fields.cache_salt))
    return JSONResponse(await unless_disconnected(request.receive, work))


async def _decide(fields: DecisionRequest, record: RequestRecord, services: Services) -> dict[str, Any]:
    record.priority = fields.priority
    decisions = await read_decisions(fields, services.model, services.shots)
    methods = [await _method(decision, fields, services) for decision in decisions]
    writers = [
        partial(_prepare, each, method, fields, services) for each, method in zip(decisions, methods, strict=True)
    ]
    first, prepared = await _first_that_fits(writers)
    prompted, compared = asyncio.Semaphore(max(MAX_CONCURRENT // fields.permutations, 1)), asyncio.Semaphore(1)

    async def answer(index: int) -> dict[str, Any]:
        async with prompted if methods[index] == IN_CONTEXT else compared:
            try:
                ready = prepared if index == first else await writers[index]()
            except ContextLengthExceeded:
                return _refusal(decisions[index])
            return await _answer(decisions[index], ready, fields, record, services)

    with record:
        answers = await run_concurrently([answer(index) for index in range(len(decisions))])
    return {
        **response_head("decision", "decision", fields, record, services.model),
        "answers": answers,
        "usage": _usage(record),
    }


async def _method(decision: Decision, fields: DecisionRequest, services: Services) -> str:
    """Return the method that answers a question.

    `auto` follows an evaluation only if it recommends a method by likeness, because a decision has other prompts. Raises
    `InvalidRequest` for a method or a target that is not possible with the examples.
    """
    question, candidates, recommended = decision.question, decision.parsed.candidates, None
    if decision.method == "auto" and question.support_set is not None:
        labels = [candidate.label for candidate in candidates]
        recommended = await services.recommendations.find(question.support_set, labels)
    best = recommended.method if recommended is not None and recommended.method in METHODS else None
    chosen = await services.comparison.choose(question, decision.method, candidates, best)
    chosen.threshold(fields)
    return chosen.method


async def _prepare(decision: Decision, method: str, fields: DecisionRequest, services: Services) -> PreparedQuestion:
    """Fit the method of a question, and write its prompts if the method needs some.

    Raises the errors of `prepare_question`.
    """
    candidates = decision.parsed.candidates
    chosen = await services.comparison.choose(decision.question, method, candidates)
    question = decision.question.with_each_label(len(candidates))
    return await prepare_question(question, candidates, chosen, fields, services.model, services.shots)


async def _first_that_fits(
    written: Sequence[Callable[[], Awaitable[PreparedQuestion]]],
) -> tuple[int, PreparedQuestion]:
    """Return the first question that fits the model's context, and its index. Raises `ContextLengthExceeded`."""
    refused: list[ContextLengthExceeded] = []
    for index, write in enumerate(written):
        try:
            return index, await write()
        except ContextLengthExceeded as error:
            refused.append(error)
    raise refused[0]


async def _answer(
    decision: Decision,
    prepared: PreparedQuestion,
    request: DecisionRequest,
    record: RequestRecord,
    services: Services,
) -> dict[str, Any]:
    """Return the answer to a question, which is a refusal if no candidate is more probable than the threshold.

    Raises the engine's errors.
    """
    if decision.has_examples:
        record_shots(prepared.question, prepared.assembled, record)
    in_context, likeness = await gather(prepared, record, services.comparison, services.engine)
    record.classified(prepared.chosen.method)
    ranked = weigh(decision.parsed.candidates, in_context, likeness, prepared.chosen.temperature(request))
    threshold = prepared.chosen.threshold(request)
    if threshold is not None and ranked[0].probability <= threshold:
        return _refusal(decision)
    fields = decision.parsed.fields
    answer = {"type": fields.type, "name": fields.name, **_judgement(fields, ranked)}
    if isinstance(fields, ChoiceQuestion) and decision.has_examples:
        answer["method"] = prepared.chosen.method
    return answer


def _judgement(fields: DecisionQuestion, ranked: Sequence[WeighedCandidate]) -> dict[str, Any]:
    """Return the fields of an answer that depend on the type of its question."""
    probabilities = {each.text: each.probability for each in ranked}
    match fields:
        case ChoiceQuestion(choices=choices):
            (choice,) = (each.value for each in choices if each.text == ranked[0].text)
            return {
                "choice": choice,
                "confidence": ranked[0].probability,
                "probabilities": [{"value": each.value, "probability": probabilities[each.text]} for each in choices],
            }
        case ScoreQuestion(levels=levels):
            return {
                "score": math.fsum(index * probabilities[level.label] for index, level in enumerate(levels)),
                "confidence": ranked[0].probability,
                "probabilities": [
                    {"label": level.label, "value": index, "probability": probabilities[level.label]}
                    for index, level in enumerate(levels)
                ],
            }
    return {"probability": probabilities[YES]}


def _refusal(decision: Decision) -> dict[str, Any]:
    return {"type": "refusal", "name": decision.parsed.fields.name}


def _usage(record: RequestRecord) -> dict[str, Any]:
    """Return the usage under OpenAI's names for this route."""
    usage = record.usage()
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
        "fewshot_details": usage["fewshot_details"],
    }
