"""Which candidate would answer the query? Each is scored behind the same prompt, in several orders of the shots at once.

A content-free query shows what the shots and the words favour by themselves. Its media is a grey picture, not none: text
reads the last media before it, so without its own it would read the last shot's, and that shot is not free of content.
"""

from __future__ import annotations

import asyncio
import io
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from server.asking import Asking, replied
from server.errors import ContextLengthExceeded, InvalidRequest
from server.fewshot.candidates import Candidate, continuation_ids
from server.fewshot.prompting import Assembled, write
from server.fewshot.scoring import Array, Weighing, probabilities, ranking, scores, shot_orders
from server.fewshot.templates import Query
from server.media.source import EncodedMedia, source_digest
from server.read_prompt import PreparedPrompt
from server.services import Services
from server.wire import Score, Scored

NO_TEXT = "N/A"
GREY = (128, 128, 128)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of all prompts that were computed for one classification."""

    prompts: int
    prompt_tokens: int
    cached_tokens: int
    candidate_tokens: int
    media: int
    media_encoded: int
    media_cached: int
    media_deduplicated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """`logprob`: the sum over the candidate's tokens, as the model gives it, mean over the orders of the shots."""

    candidate: Candidate
    num_tokens: int
    logprob: float
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """Candidates in the order that they were given; `num_orders`: of the shots, at most as many as there are."""

    weighed: list[Weighed]
    num_orders: int
    cost: Cost

    def ranked(self) -> list[Weighed]:
        return [self.weighed[place] for place in ranking(np.array([one.probability for one in self.weighed]))]


async def classify(
    assembled: Assembled, candidates: Sequence[Candidate], weighing: Weighing, asking: Asking, services: Services
) -> Classification:
    """Raises `InvalidRequest` for a candidate without tokens or too long for the model, and what the engine raises."""
    tokenizer, template = services.model.tokenizer, assembled.template
    segments = template.render(assembled.shots, assembled.query)
    ids = [continuation_ids(segments, template.continuation(one.text), tokenizer) for one in candidates]
    orders = shot_orders(len(assembled.shots), weighing.permutations, weighing.seed)
    prompts = _prompts(assembled, orders, weighing, services)
    check_candidates(prompts, ids, services.model.max_model_len)
    scored = await score_all(prompts, ids, asking, services)
    per_order = np.array([scores(one.logprobs, weighing.normalisation) for one in scored])
    per_order = per_order.reshape(len(orders), -1, len(ids))  # [orders, queries, candidates], the asked query first
    sums = np.array([scores(one.logprobs, "sum") for one in scored]).reshape(per_order.shape)[:, 0].mean(0)
    is_calibrated = weighing.calibration == "contextual"
    found = probabilities(per_order[:, 0], per_order[:, 1:] if is_calibrated else None)
    return Classification(
        weighed=_weighed(candidates, ids, sums, found), num_orders=len(orders), cost=cost(prompts, ids, scored)
    )


async def score_all(
    prompts: Sequence[PreparedPrompt], ids: list[list[int]], asking: Asking, services: Services
) -> list[Scored]:
    """The candidates behind each of the prompts, all under way at once; the first failure ends the others."""
    return await replied(asking, together([_score(prompt, ids, asking, services) for prompt in prompts]))


def check_candidates(prompts: Sequence[PreparedPrompt], ids: Sequence[list[int]], max_model_len: int) -> None:
    longest = max(prompt.num_tokens for prompt in prompts)
    for place, candidate in enumerate(ids):
        if not candidate:
            raise InvalidRequest("a candidate needs text that the model can write", param=f"candidates[{place}]")
        if longest + len(candidate) > max_model_len:
            raise ContextLengthExceeded(
                f"the prompt has {longest} tokens and this candidate {len(candidate)}: "
                f"together more than the {max_model_len} that this model reads",
                param="prompt" if longest >= max_model_len else f"candidates[{place}]",
            )


def cost(prompts: Sequence[PreparedPrompt], ids: Sequence[list[int]], scored: Sequence[Scored]) -> Cost:
    shown = [prompt.encoded.media for prompt in prompts]
    return Cost(
        prompts=len(prompts),
        prompt_tokens=sum(prompt.num_tokens for prompt in prompts),
        cached_tokens=sum(one.cached_tokens for one in scored),
        candidate_tokens=len(prompts) * sum(map(len, ids)),
        media=sum(map(len, shown)),
        media_encoded=sum(one.media_encoded for one in scored),
        media_cached=sum(one.media_cached for one in scored),
        media_deduplicated=sum(len(media) - len(set(media)) for media in shown),
    )


def _prompts(
    assembled: Assembled, orders: Sequence[Sequence[int]], weighing: Weighing, services: Services
) -> list[PreparedPrompt]:
    """Order by order: the query, then the content-free ones."""
    queries = [assembled.query, *(_content_free(assembled.query, weighing) if weighing.calibration != "none" else ())]
    media = {**assembled.prompt.media, GREY_MEDIA.digest: GREY_MEDIA}
    return [
        write(assembled.template, [assembled.shots[place] for place in order], query, media, services.model.tokenizer)
        for order in orders
        for query in queries
    ]


def _content_free(query: Query, weighing: Weighing) -> list[Query]:
    empty = replace(query, text=query.text and NO_TEXT, question=query.question and NO_TEXT)
    grey = replace(empty, media=(GREY_MEDIA.digest,) * len(query.media))
    no_media = replace(empty, media=())
    found = {"grey": [grey], "no_media": [no_media], "both": [grey, no_media]}[weighing.content_free]
    return list(dict.fromkeys(found))


def _weighed(candidates: Sequence[Candidate], ids: Sequence[list[int]], sums: Array, found: Array) -> list[Weighed]:
    return [
        Weighed(candidate=one, num_tokens=len(tokens), logprob=float(total), probability=float(probability))
        for one, tokens, total, probability in zip(candidates, ids, sums, found, strict=True)
    ]


async def _score(prompt: PreparedPrompt, ids: list[list[int]], asking: Asking, services: Services) -> Scored:
    request = Score(
        request_id=f"{asking.request_id}-{uuid.uuid4().hex[:8]}",
        prompt=prompt.encoded,
        candidates=ids,
        priority=asking.priority,
        arrived=asking.arrived,
    )
    scored = await services.client.score(request, prompt.media)
    asking.started()
    metrics = services.metrics
    metrics.request_queue_time.observe(scored.queue_seconds)
    metrics.prompt_tokens.inc(prompt.num_tokens)
    metrics.prompt_tokens_cached.inc(scored.cached_tokens)
    metrics.media_encoded.inc(scored.media_encoded)
    metrics.media_cached.inc(scored.media_cached)
    return scored


async def together(work: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All at once; the first failure cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


def _grey_media() -> EncodedMedia:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), GREY).save(file, "PNG")
    data = file.getvalue()
    return EncodedMedia(kind="image", data=data, digest=source_digest(data, "image"), param="query")


GREY_MEDIA = _grey_media()
