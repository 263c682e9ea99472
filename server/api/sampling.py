"""A request's sampling fields as the engine's `Sampling`; what depends on the model's vocabulary is checked here."""

from __future__ import annotations

from server.api.schemas import GenerationFields
from server.engine.wire import Sampling
from server.errors import InvalidRequest


def sampling(
    fields: GenerationFields, max_tokens: int, num_token_ids: int, logprobs: int | None, prompt_logprobs: int | None
) -> Sampling:
    if fields.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {fields.min_tokens}, more than max_tokens {max_tokens}", param="min_tokens"
        )
    for place, token_id in enumerate(fields.stop_token_ids):
        _check_id(token_id, num_token_ids, f"stop_token_ids[{place}]")
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=fields.min_tokens,
        temperature=fields.temperature,
        top_p=fields.top_p,
        top_k=max(fields.top_k, 0),
        min_p=fields.min_p,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        repetition_penalty=fields.repetition_penalty,
        logit_bias=_logit_bias(fields, num_token_ids),
        seed=fields.seed,
        ignore_eos=fields.ignore_eos,
        stop_token_ids=tuple(fields.stop_token_ids),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _logit_bias(fields: GenerationFields, num_token_ids: int) -> dict[int, float]:
    """JSON's keys are strings: token ids in decimal."""
    bias = {}
    for key, value in fields.logit_bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise InvalidRequest(f"logit_bias: {key[:32]!r} is no token id", param="logit_bias")
        _check_id(int(key), num_token_ids, "logit_bias")
        bias[int(key)] = value
    return bias


def _check_id(token_id: int, num_token_ids: int, param: str) -> None:
    if token_id >= num_token_ids:
        message = f"{param}: token id {token_id} is not below the vocabulary's size {num_token_ids}"
        raise InvalidRequest(message, param=param)
