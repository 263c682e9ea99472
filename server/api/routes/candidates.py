"""Routes that score given answers: `/v1/classify` after shots and a template, `/v1/score` after a plain prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.answer_text import token_text
from server.api.body import read_request
from server.api.openapi import PROMPT, SUPPORT_SET_ERRORS, describe
from server.api.responses import JSONResponse, response_head
from server.api.services import GivenRecord, GivenServices, Services
from server.api.sse import unless_disconnected
from server.errors import InvalidRequest
from server.fewshot.candidates import Candidate, candidates_of, read_candidates
from server.fewshot.classification import check_candidates, score_prompt, weigh
from server.fewshot.comparison import ChosenMethod
from server.fewshot.evidence import gather, prepare_question
from server.fewshot.prompting import Question, fewshot_report, read_question, record_shots
from server.fewshot.shots import SUPPORT_SET
from server.prompt import PromptEnd, check_texts, check_token_ids, prepare_prompt
from server.schemas.fewshot import ClassifyRequest, ScoreRequest
from server.schemas.responses.completions import Classification, Scores
from server.served_model import ServedModel
from server.telemetry.request_record import RequestRecord

router = APIRouter()


@router.post(
    "/v1/classify",
    **describe("Few-shot", body=ClassifyRequest, response=Classification, errors=(*PROMPT, *SUPPORT_SET_ERRORS)),
)
async def create_classification(request: Request, services: GivenServices, record: GivenRecord) -> Response:
    """Rank candidate answers to a few-shot query by probability."""
    fields = await read_request(ClassifyRequest, request, services)
    work = _classify(fields, record, services.with_salt(fields.cache_salt))
    return JSONResponse(await unless_disconnected(request.receive, work))


async def _classify(fields: ClassifyRequest, record: RequestRecord, services: Services) -> dict[str, Any]:
    model = services.model
    candidates = read_candidates(fields.candidates)
    record.priority = fields.priority
    question = await read_question(fields, model, services.shots)
    candidates = candidates or _answers(question)
    chosen, question = await _choose(question, fields, candidates, services)
    threshold = chosen.threshold(fields)
    prepared = await prepare_question(question, candidates, chosen, fields, model, services.shots)
    record_shots(question, prepared.assembled, record)
    with record:
        in_context, likeness = await gather(prepared, record, services.comparison, services.engine)
    record.classified(chosen.method)
    temperature = chosen.temperature(fields)
    ranked = weigh(candidates, in_context, likeness, temperature)
    confidence = ranked[0].probability
    return {
        **response_head("classification", "classify", fields, record, model),
        "method": chosen.method,
        "label": ranked[0].label if threshold is None or confidence > threshold else None,
        "confidence": confidence,
        "temperature": temperature,
        "threshold": threshold,
        "candidates": [asdict(candidate) for candidate in ranked[: fields.top_k]],
        "fewshot": {
            **fewshot_report(question, prepared.assembled),
            "normalisation": fields.normalisation,
            "calibration": fields.calibration,
            "permutations": in_context.num_orders if in_context else 0,
        },
        "usage": record.usage(),
    }


async def _choose(
    question: Question, fields: ClassifyRequest, candidates: Sequence[Candidate], services: Services
) -> tuple[ChosenMethod, Question]:
    """Return the method of a request, and the question with the shots for it.

    Where the request leaves them to the server, both are what the latest evaluation of the support set recommends, if any.
    """
    method, recommended = fields.method_or_default, None
    if question.support_set is not None and (method == "auto" or (fields.target and fields.has_prompt)):
        labels = [candidate.label for candidate in candidates]
        recommended = await services.recommendations.find(question.support_set, labels)
    followed = recommended if recommended and method == "auto" and recommended.suits(fields) else None
    best = followed.method if followed else None
    chosen = await services.comparison.choose(question, method, candidates, best)
    if followed and best == chosen.method:
        question = question.with_selection(followed.examples, followed.shots_attend)
    question = question.with_each_label(len(candidates))
    if recommended and chosen.reads_prompt and recommended.is_of(chosen.method, question.fields, fields):
        chosen = replace(chosen, confidence=recommended.confidence)
    return chosen, question


def _answers(question: Question) -> list[Candidate]:
    """Return the answers of the examples as candidates. Raises `InvalidRequest` if there are none, or too many."""
    if candidates := candidates_of(question.examples):
        return candidates
    if question.support_set is not None:
        message = "no example of the support set has a label or a text: add some, or give candidates"
        raise InvalidRequest(message, param=SUPPORT_SET)
    if question.shots:
        raise InvalidRequest("no shot has a label or a text: add some, or give candidates", param="shots")
    raise InvalidRequest("without shots or a support set there are no labels: give candidates", param="candidates")


@router.post("/v1/score", **describe("Completions", body=ScoreRequest, response=Scores, errors=PROMPT))
async def create_score(request: Request, services: GivenServices, record: GivenRecord) -> Response:
    """Return the log-probabilities of continuations of a prompt."""
    fields = await read_request(ScoreRequest, request, services)
    work = _score(fields, record, services.with_salt(fields.cache_salt))
    return JSONResponse(await unless_disconnected(request.receive, work))


async def _score(fields: ScoreRequest, record: RequestRecord, services: Services) -> dict[str, Any]:
    model = services.model
    prompt = await prepare_prompt(fields.prompt, model, services.intake, fields.shots_attend)
    candidates = {f"candidates[{index}]": candidate for index, candidate in enumerate(fields.candidates)}
    end = PromptEnd(prompt.segments, model.tokenizer)
    candidate_ids = await model.tokenize.each(lambda param: _ids(candidates[param], param, end, model), candidates)
    record.priority = fields.priority
    check_candidates([prompt], candidate_ids, list(candidates), model)
    with record:
        scored = await score_prompt(prompt, candidate_ids, record, services.engine)
    return {
        **response_head("score", "score", fields, record, model),
        "data": [
            {
                "index": index,
                "logprob": math.fsum(logprobs),
                "num_tokens": len(ids),
                "token_ids": ids,
                "tokens": [token_text(model.tokenizer, token_id) for token_id in ids],
                "token_logprobs": logprobs,
            }
            for index, (ids, logprobs) in enumerate(zip(candidate_ids, scored.logprobs, strict=True))
        ],
        "usage": record.usage(),
    }


def _ids(candidate: str | list[int], param: str, end: PromptEnd, model: ServedModel) -> list[int]:
    if isinstance(candidate, str):
        check_texts([candidate], model, param)
        return end.ids_after(candidate)
    if model.tokenizer.media_token_id in candidate:
        raise InvalidRequest("a candidate may not contain the media token", param=param)
    return check_token_ids(candidate, model, param)
