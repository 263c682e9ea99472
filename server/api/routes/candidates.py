"""Routes that weigh given answers: `/v1/classify` with shots and templates, `/v1/score` per token of a plain prompt."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.answer_text import token_text
from server.api.body import JSONResponse, read_request
from server.api.openapi import PROMPT, SUPPORT_SET, describe
from server.api.services import GivenRecord, GivenServices, Services
from server.api.sse import unless_disconnected
from server.errors import InvalidRequest, UnsupportedParameter
from server.fewshot.candidates import Candidate, answer_of, read_candidates
from server.fewshot.classification import classify_in_context, score_prompts, weigh
from server.fewshot.comparison import Chosen
from server.fewshot.methods import METHODS
from server.fewshot.prompting import Question, assemble, read_question
from server.fewshot.shots import SUPPORT_SET as SUPPORT_SET_FIELD
from server.prompt import PreparedPrompt, check_texts, check_token_ids, continuation_ids, encode_text, prepare_prompt
from server.request_record import RequestRecord
from server.schemas.fewshot import ClassifyRequest, ScoreRequest
from server.schemas.responses.completions import Classification, Scores
from server.served_model import ServedModel

router = APIRouter()


@router.post(
    "/v1/classify",
    **describe("Few-shot", body=ClassifyRequest, response=Classification, errors=(*PROMPT, *SUPPORT_SET)),
)
async def create_classification(request: Request, services: GivenServices, record: GivenRecord) -> Response:
    """Return which of the candidates answers a few-shot query, with probabilities."""
    fields = await read_request(ClassifyRequest, request, services)
    return JSONResponse(await unless_disconnected(request.receive, _classify(fields, record, services)))


async def _classify(fields: ClassifyRequest, record: RequestRecord, services: Services) -> dict[str, Any]:
    model = services.model
    candidates = read_candidates(fields.candidates)
    record.priority = fields.priority
    question = await read_question(fields, model, services.shots)
    candidates = candidates or _answers(question)
    chosen, question = await _choose(question, fields, candidates, services)
    temperature = chosen.confidence.temperature if fields.temperature is None else fields.temperature
    threshold = _threshold(fields, chosen)
    in_context = None
    if chosen.reads_prompt:
        texts = [(f"candidates[{index}]", candidate.text) for index, candidate in enumerate(candidates)]
        token_ids = [await model.tokenize(encode_text, text, model, param) for param, text in texts]
        room = max(map(len, token_ids)) + 1
        assembled = await assemble(question, model, services.shots, room=room)
        report = assembled.report(record)
        likeness = await services.comparison.compare(question, chosen)
        in_context = await classify_in_context(assembled, candidates, fields, record, model, services.client)
    else:
        report = question.report(record)
        with record:
            record.add_prompt(0, question.query.media)
            likeness = await services.comparison.compare(question, chosen)
            record.answered(0)
    ranked = weigh(candidates, in_context, likeness, temperature)
    confidence = ranked[0].probability
    return {
        "id": f"classify-{fields.request_id or record.request_id}",
        "object": "classification",
        "created": int(time.time()),
        "model": model.name,
        "method": chosen.method,
        "label": ranked[0].label if threshold is None or confidence > threshold else None,
        "confidence": confidence,
        "temperature": temperature,
        "threshold": threshold,
        "candidates": [asdict(candidate) for candidate in ranked[: fields.top_k]],
        "fewshot": {
            **report,
            "normalisation": fields.normalisation,
            "calibration": fields.calibration,
            "permutations": in_context.num_orders if in_context else 0,
        },
        "usage": record.usage(),
    }


async def _choose(
    question: Question, fields: ClassifyRequest, candidates: Sequence[Candidate], services: Services
) -> tuple[Chosen, Question]:
    """Return the method of a request, and the question with the shots that its prompt has, if it has one."""
    method, recommended = fields.method_or_default, None
    if question.support_set is not None and (method == "auto" or (fields.target and fields.has_prompt)):
        labels = [candidate.label for candidate in candidates]
        recommended = await services.recommendations.find(question.support_set, labels)
    best = recommended.method if recommended is not None and method == "auto" else None
    chosen = await services.comparison.choose(question, method, candidates, best)
    if best == chosen.method and recommended is not None:
        question = question.with_selection(recommended.examples)
    question = question.with_each_label(len(candidates))
    if (
        chosen.reads_prompt
        and recommended is not None
        and recommended.is_of(chosen.method, question.fields.examples, fields)
    ):
        chosen = replace(chosen, confidence=recommended.confidence)
    return chosen, question


def _threshold(fields: ClassifyRequest, chosen: Chosen) -> float | None:
    """Return the threshold that a request's target needs; None without one. Raises `UnsupportedParameter`."""
    confidence = chosen.confidence
    if fields.target is None:
        return None
    name, target = fields.target
    if not confidence.curve:
        raise UnsupportedParameter(f"{name} {_lack(chosen)}", param=name)
    if fields.temperature not in (None, confidence.temperature):
        message = f"{name} needs the temperature that was fitted, {confidence.temperature}: leave temperature out"
        raise UnsupportedParameter(message, param="temperature")
    return confidence.threshold(name, target)


def _lack(chosen: Chosen) -> str:
    """Return what a method would need for a threshold."""
    if chosen.reads_prompt:
        return (
            f"needs an evaluation for the method {chosen.method}: evaluate the support set, and send the examples, the "
            "method and the temperature that it recommends, or use a method by likeness"
        )
    limit = METHODS[chosen.method].max_left_out
    most = f", and {chosen.method} leaves out one of up to {limit}" if math.isfinite(limit) else ""
    return f"needs two examples of each candidate, so that one can be left out{most}"


def _answers(question: Question) -> list[Candidate]:
    """Return the answers of the examples as candidates. Raises `InvalidRequest` if there are none."""
    if candidates := read_candidates(dict.fromkeys(filter(None, map(answer_of, question.examples)))):
        return candidates
    if question.support_set is not None:
        message = "no example of the support set has a label or a text: add some, or give candidates"
        raise InvalidRequest(message, param=SUPPORT_SET_FIELD)
    if question.shots:
        raise InvalidRequest("no shot has a label or a text: add some, or give candidates", param="shots")
    raise InvalidRequest("without shots or a support set there are no labels: give candidates", param="candidates")


@router.post("/v1/score", **describe("Completions", body=ScoreRequest, response=Scores, errors=PROMPT))
async def create_score(request: Request, services: GivenServices, record: GivenRecord) -> Response:
    """Return the log-probabilities of given continuations of a prompt."""
    fields = await read_request(ScoreRequest, request, services)
    return JSONResponse(await unless_disconnected(request.receive, _score(fields, record, services)))


async def _score(fields: ScoreRequest, record: RequestRecord, services: Services) -> dict[str, Any]:
    model = services.model
    prompt = await prepare_prompt(fields.prompt, model, services.intake)
    candidate_ids = [
        await model.tokenize(_ids, candidate, index, prompt, model) for index, candidate in enumerate(fields.candidates)
    ]
    record.priority = fields.priority
    (scored,) = await score_prompts([prompt], candidate_ids, record, model, services.client)
    return {
        "id": f"score-{fields.request_id or record.request_id}",
        "object": "score",
        "created": int(time.time()),
        "model": model.name,
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


def _ids(candidate: str | list[int], index: int, prompt: PreparedPrompt, model: ServedModel) -> list[int]:
    param = f"candidates[{index}]"
    if isinstance(candidate, str):
        check_texts([candidate], model, param)
        return continuation_ids(prompt.segments, candidate, model.tokenizer)
    if model.tokenizer.media_token_id in candidate:
        raise InvalidRequest("a candidate may not contain the media token", param=param)
    return check_token_ids(candidate, model, param)
