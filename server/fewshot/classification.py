"""Classifies a query: scores each candidate after the same prompt, for several orders of the shots concurrently.

The scores of a content-free query measure which labels the shots favour by themselves. It has a grey image in place of
media: text reads the last media before it, so without an image it would read the last shot's, which has content.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from server.engine_client.client import Client
from server.errors import InvalidRequest
from server.fewshot.prompting import AssembledPrompt, write
from server.fewshot.scoring import Weighing, probabilities, ranking, scores, shot_orders
from server.fewshot.templates import Query
from server.media.source import EncodedMedia, encoded
from server.prompt import PreparedPrompt, check_length, continuation_ids
from server.request_record import RequestRecord
from server.schemas.fewshot import CandidateField
from server.served_model import ServedModel
from server.wire import Score, Scored

NO_TEXT = "N/A"
GREY = (128, 128, 128)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A possible answer: its name in the response, and the text that the model would write."""

    label: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeighedCandidate:
    """A candidate's probability; `logprob` is the sum over its tokens, the mean over the orders of the shots."""

    candidate: Candidate
    num_tokens: int
    logprob: float
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """Weighed candidates in the order of the request; `num_orders` is the number of computed orders of the shots."""

    candidates: list[WeighedCandidate]
    num_orders: int

    def ranked(self) -> list[WeighedCandidate]:
        order = ranking(np.array([candidate.probability for candidate in self.candidates]))
        return [self.candidates[index] for index in order]


async def classify(
    assembled: AssembledPrompt,
    candidates: Sequence[Candidate],
    weighing: Weighing,
    record: RequestRecord,
    model: ServedModel,
    client: Client,
) -> Classification:
    """Classify the query of an assembled prompt.

    Raises `InvalidRequest` for a candidate without tokens or too long for the model, and the engine's errors.
    """
    template = assembled.template
    token_ids = [
        continuation_ids(assembled.prompt.segments, template.continuation(candidate.text), model.tokenizer)
        for candidate in candidates
    ]
    orders = shot_orders(len(assembled.shots), weighing.permutations, weighing.seed)
    prompts = _prompts(assembled, orders, weighing, model)
    scored = await score_prompts(prompts, token_ids, record, model, client)
    per_prompt = np.array([scores(prompt.logprobs, weighing.normalisation) for prompt in scored])
    per_order = per_prompt.reshape(len(orders), -1, len(candidates))  # [orders, queries, candidates], the query first
    sums = np.array([scores(prompt.logprobs, "sum") for prompt in scored]).reshape(per_order.shape)[:, 0].mean(0)
    content_free = per_order[:, 1:] if weighing.calibration == "contextual" else None
    weighed = [
        WeighedCandidate(
            candidate=candidate, num_tokens=len(ids), logprob=float(logprob), probability=float(probability)
        )
        for candidate, ids, logprob, probability in zip(
            candidates, token_ids, sums, probabilities(per_order[:, 0], content_free), strict=True
        )
    ]
    return Classification(candidates=weighed, num_orders=len(orders))


async def score_prompts(
    prompts: Sequence[PreparedPrompt],
    candidate_ids: list[list[int]],
    record: RequestRecord,
    model: ServedModel,
    client: Client,
) -> list[Scored]:
    """Score the candidates after each prompt, all concurrently; the first failure cancels the others.

    Raises `InvalidRequest` for a candidate without tokens or too long for the model, and the engine's errors.
    """
    longest = max(prompt.num_tokens for prompt in prompts)
    for index, ids in enumerate(candidate_ids):
        if not ids:
            raise InvalidRequest("a candidate must have at least one token", param=f"candidates[{index}]")
        check_length(longest, len(ids), "this candidate", f"candidates[{index}]", model.max_model_len)
    record.details |= {"prompts": len(prompts), "candidate_tokens": len(prompts) * sum(map(len, candidate_ids))}
    for prompt in prompts:
        record.add_prompt(prompt.num_tokens, prompt.encoded.media)
    with record:
        return await run_concurrently([_score(prompt, candidate_ids, record, client) for prompt in prompts])


async def _score(
    prompt: PreparedPrompt, candidate_ids: list[list[int]], record: RequestRecord, client: Client
) -> Scored:
    request = Score(
        request_id=record.new_engine_id(),
        prompt=prompt.encoded,
        candidates=candidate_ids,
        priority=record.priority,
        arrived=record.arrived,
    )
    scored = await client.score(request, prompt.media)
    record.admitted(scored, prompt.num_tokens)
    return scored


def read_candidates(fields: Sequence[CandidateField]) -> list[Candidate]:
    """Return the candidates of a request. Raises `InvalidRequest` for two with the same label or the same text."""
    candidates = [Candidate(f, f) if isinstance(f, str) else Candidate(f.label, f.text) for f in fields]
    return check_distinct(candidates)


def label_candidates(labels: Iterable[str]) -> list[Candidate]:
    """Return a candidate for each distinct label, in order of appearance; empty labels are skipped."""
    return [Candidate(label, label) for label in dict.fromkeys(labels) if label]


def check_distinct(candidates: list[Candidate]) -> list[Candidate]:
    """Return the candidates. Raises `InvalidRequest` for two with the same label or the same text."""
    for name in ("label", "text"):
        first_index: dict[str, int] = {}
        for index, candidate in enumerate(candidates):
            first = first_index.setdefault(getattr(candidate, name), index)
            if first != index:
                message = f"candidates {first} and {index} have the same {name}"
                raise InvalidRequest(message, param=f"candidates[{index}]")
    return candidates


def _prompts(
    assembled: AssembledPrompt, orders: Sequence[Sequence[int]], weighing: Weighing, model: ServedModel
) -> list[PreparedPrompt]:
    """Return the prompts order by order: the query, then the content-free queries."""
    queries = [assembled.query, *(_content_free(assembled.query, weighing) if weighing.calibration != "none" else ())]
    media = {**assembled.prompt.media, GREY_MEDIA.digest: GREY_MEDIA}
    return [
        write(assembled.template, [assembled.shots[index] for index in order], query, media, model)
        for order in orders
        for query in queries
    ]


def _content_free(query: Query, weighing: Weighing) -> list[Query]:
    empty = replace(query, text=query.text and NO_TEXT, question=query.question and NO_TEXT)
    grey = replace(empty, media=(GREY_MEDIA.digest,) * len(query.media))
    no_media = replace(empty, media=())
    queries = {"grey": [grey], "no_media": [no_media], "both": [grey, no_media]}[weighing.content_free]
    return list(dict.fromkeys(queries))


async def run_concurrently(coroutines: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Run coroutines concurrently; the first failure cancels the others and is raised, not an exception group."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    return [task.result() for task in tasks]


def _grey_media() -> EncodedMedia:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), GREY).save(file, "PNG")
    return encoded(file.getvalue(), "image", "query")


GREY_MEDIA = _grey_media()
