"""Classifies a query in context: scores each candidate after one prompt, for several orders of the shots concurrently.

The scores of a content-free query measure which labels the shots favour by themselves. It has a grey image instead of
media: text reads the last media before it, so without an image it would read the last shot's, which has content. Each order
of the shots has its own bias, so its scores are calibrated by content-free queries after the same order. Then the orders
are averaged (the paper's ensembling, in log-probabilities). All sums are computed in log space.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from random import Random

import numpy as np
from PIL import Image

from server.concurrency import run_concurrently
from server.engine_client.client import EngineClient
from server.errors import InvalidRequest
from server.fewshot.candidates import Candidate
from server.fewshot.confidence import probabilities
from server.fewshot.methods import IN_CONTEXT
from server.fewshot.methods.likeness import Array, log_softmax
from server.fewshot.prompting import AssembledPrompt, write
from server.fewshot.templates import Shot
from server.media.source import EncodedMedia, encoded
from server.prompt import PreparedPrompt, PromptEnd, order_matters
from server.schemas.fewshot import ContentFree, Normalisation, WeighingFields
from server.schemas.responses.completions import WeighedCandidate
from server.served_model import ServedModel
from server.telemetry.request_record import RequestRecord
from server.wire import Score, Scored

NO_TEXT = "N/A"
GREY = (128, 128, 128)
# up to this number of orders, all are listed and sampled without repetition; with more, a random order rarely repeats
MAX_LISTED_SHOTS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class InContext:
    """The language model's answer: log-probabilities [C] of the candidates, and the sums from which they were computed.

    `sums`: the log-probability of each candidate's text, the mean over `num_orders` orders of the shots.
    """

    log_probabilities: Array
    sums: Array
    num_tokens: list[int]
    num_orders: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringPrompts:
    """The prompts after which candidates are scored: for each order of the shots, the query's and content-free ones."""

    prompts: list[PreparedPrompt]
    candidate_ids: list[list[int]]
    num_orders: int
    weighing: WeighingFields


def weigh(
    candidates: Sequence[Candidate],
    in_context: InContext | None,
    likeness: Mapping[str, Array],
    temperature: float,
) -> list[WeighedCandidate]:
    """Return the candidates, the most probable first; equally probable ones keep their order."""
    parts = {**({IN_CONTEXT: in_context.log_probabilities} if in_context else {}), **likeness}
    logs = combine([*parts.values()])
    weights = probabilities(logs, temperature)
    weighed = [
        WeighedCandidate(
            label=candidate.label,
            text=candidate.text,
            logprob=float(in_context.sums[index]) if in_context else None,
            num_tokens=in_context.num_tokens[index] if in_context else None,
            probability=float(weights[index]),
            scores={name: float(logs[index]) for name, logs in parts.items()},
        )
        for index, candidate in enumerate(candidates)
    ]
    # not sorted by probability: probabilities may be equal after rounding
    return [weighed[index] for index in np.argsort(-logs, kind="stable")]


def combine(parts: Sequence[Array]) -> Array:
    """Return log-probabilities [C] of candidates: parts are independent evidence, so their log-probabilities are added."""
    return log_softmax(np.sum(parts, axis=0))


async def prepare_scoring(
    assembled: AssembledPrompt, candidates: Sequence[Candidate], weighing: WeighingFields, model: ServedModel
) -> ScoringPrompts:
    """Write the prompts of a classification by likelihood. Raises what `check_candidates` raises."""
    question, segments = assembled.question, assembled.prompt.segments
    template, attend = question.template, question.fields.shots_attend
    texts = [template.lead + candidate.text for candidate in candidates]
    token_ids = await model.tokenize.each(PromptEnd(segments, model.tokenizer).ids_after, texts)
    num_orders = weighing.permutations if order_matters(attend, model) else 1
    orders = shot_orders(len(assembled.shots), num_orders, weighing.seed)
    is_calibrated = weighing.calibration == "contextual"
    queries = [question.query, *(_content_free(question.query, weighing.content_free) if is_calibrated else ())]
    media = {**assembled.prompt.media, GREY_MEDIA.digest: GREY_MEDIA}
    # the prompt of the query after the original order of the shots exists already
    prompts = [assembled.prompt]
    for order, query in list(product(orders, queries))[1:]:
        shots = [assembled.shots[index] for index in order]
        prompts.append(await model.tokenize(write, template, shots, query, media, model, attend))
    check_candidates(prompts, token_ids, [candidate.param for candidate in candidates], model)
    return ScoringPrompts(prompts=prompts, candidate_ids=token_ids, num_orders=len(orders), weighing=weighing)


async def score_in_context(prompts: ScoringPrompts, record: RequestRecord, engine: EngineClient) -> InContext:
    """Score the candidates after each prompt, concurrently, and return their log-probabilities.

    Raises the engine's errors; the first one cancels the other prompts.
    """
    ids = prompts.candidate_ids
    scored = await run_concurrently([score_prompt(prompt, ids, record, engine) for prompt in prompts.prompts])
    weighing, num_tokens = prompts.weighing, list(map(len, scored[0].logprobs))
    shape = (prompts.num_orders, -1, len(num_tokens))  # [orders, queries, candidates]; the query itself is the first
    per_order = np.array([scores(prompt.logprobs, weighing.normalisation) for prompt in scored]).reshape(shape)
    sums = np.array([scores(prompt.logprobs, "sum") for prompt in scored]).reshape(shape)[:, 0].mean(0)
    content_free = per_order[:, 1:] if weighing.calibration == "contextual" else None
    logs = log_probabilities(per_order[:, 0], content_free)
    return InContext(log_probabilities=logs, sums=sums, num_tokens=num_tokens, num_orders=prompts.num_orders)


def check_candidates(
    prompts: Sequence[PreparedPrompt], candidate_ids: Sequence[list[int]], params: Sequence[str], model: ServedModel
) -> None:
    """Check candidates before they are scored after prompts; `params` are their paths in the request.

    Raises `InvalidRequest` for a candidate without tokens or too long for the model.
    """
    longest = max(prompts, key=lambda prompt: prompt.num_tokens)
    for param, ids in zip(params, candidate_ids, strict=True):
        if not ids:
            raise InvalidRequest("a candidate must have at least one token", param=param)
        longest.check_room(len(ids), "this candidate", param, model)


async def score_prompt(
    prompt: PreparedPrompt, candidate_ids: list[list[int]], record: RequestRecord, engine: EngineClient
) -> Scored:
    """Score the candidates after one prompt. Raises the engine's errors.

    The record stays open for further prompts of the request.
    """
    request_id = record.begin_prompt(
        prompt.num_tokens,
        prompt.encoded.media,
        prompt.encoded.shots_attend,
        num_candidate_tokens=sum(map(len, candidate_ids)),
    )
    request = Score(
        request_id=request_id,
        prompt=prompt.encoded,
        candidates=candidate_ids,
        priority=record.priority,
        client=record.client,
        arrived=record.arrived,
    )
    scored = await engine.score(request, prompt.media)
    record.admitted(scored, prompt.num_tokens)
    return scored


def _content_free(query: Shot, media: ContentFree) -> list[Shot]:
    empty = replace(query, text=query.text and NO_TEXT, question=query.question and NO_TEXT, content=())
    grey = replace(empty, media=(GREY_MEDIA.digest,) * len(query.media))
    no_media = replace(empty, media=())
    return list(dict.fromkeys({"grey": [grey], "no_media": [no_media], "both": [grey, no_media]}[media]))


def scores(logprobs: Sequence[Sequence[float]], normalisation: Normalisation) -> Array:  # -> [candidates]
    """Return one score per candidate from the log-probabilities of its tokens, of which it has at least one."""
    sums = np.array([math.fsum(tokens) for tokens in logprobs])
    return sums if normalisation == "sum" else sums / [len(tokens) for tokens in logprobs]


def bias(content_free: Array) -> Array:  # [..., queries, candidates] -> [..., candidates]
    """Return the log of the candidates' mean probability over content-free queries.

    With these probabilities the model would answer without any content (Zhao et al. 2021, "Calibrate Before Use").
    """
    logs = log_softmax(content_free)
    return np.logaddexp.reduce(logs, axis=-2) - math.log(logs.shape[-2])


def log_probabilities(query_scores: Array, content_free: Array | None = None) -> Array:
    """Return log-probabilities [candidates].

    `query_scores`: [orders, candidates]; `content_free`: scores of content-free queries, [orders, queries, candidates].
    Dividing by the bias and normalising the sum to 1 is, in logs, subtracting the bias before the softmax.
    """
    logs = log_softmax(query_scores)
    if content_free is not None:
        logs = logs - bias(content_free)
    return log_softmax(logs.mean(0))


def shot_orders(num_shots: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """Return `count` distinct orders of the shots, or all if fewer exist: the original order, then drawn ones."""
    rng = Random(seed)
    original = tuple(range(num_shots))
    if num_shots <= MAX_LISTED_SHOTS:
        permuted = list(permutations(original))[1:]
        return [original, *rng.sample(permuted, min(count - 1, len(permuted)))]
    orders = {original: None}
    while len(orders) < count:
        orders[tuple(rng.sample(original, num_shots))] = None
    return list(orders)


def _grey_media() -> EncodedMedia:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), GREY).save(file, "PNG")
    return encoded(file.getvalue(), "image", "query")


GREY_MEDIA = _grey_media()
