"""A request's sampling fields as the engine's `Sampling`; what one field alone does not tell is checked here."""

from __future__ import annotations

import msgspec

from server.errors import InvalidRequest, UnsupportedParameter
from server.grammar import GrammarError, source
from server.schemas.completions import BEAM_WIDTH, GenerationFields
from server.wire import Grammar, Sampling


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
        n=fields.n,
        beam_width=_beam_width(fields),
        length_penalty=fields.length_penalty,
        early_stopping=fields.early_stopping,
        grammar=_grammar(fields),
    )


def _beam_width(fields: GenerationFields) -> int:
    """A search keeps `best_of` beams and answers with the `n` best; without one, `best_of` has no meaning of its own."""
    if not fields.use_beam_search:
        if fields.best_of not in (None, fields.n):
            raise UnsupportedParameter("best_of other than n needs use_beam_search", param="best_of")
        return 0
    width = max(BEAM_WIDTH, fields.n) if fields.best_of is None else fields.best_of
    if width < fields.n:
        raise InvalidRequest(f"best_of is {width}, less than n {fields.n}", param="best_of")
    return width


def _grammar(fields: GenerationFields) -> Grammar | None:
    form = fields.form
    if len(form.model_fields_set) > 1:
        raise InvalidRequest("structured_outputs takes one of choice, regex, json", param="structured_outputs")
    if not form.model_fields_set:
        return None
    if fields.use_beam_search:
        raise UnsupportedParameter("structured_outputs does not go with use_beam_search", param="structured_outputs")
    try:
        grammar = _read_form(fields)
        source(grammar)
    except GrammarError as error:
        raise InvalidRequest(f"structured_outputs: {error}", param="structured_outputs") from None
    return grammar


def _read_form(fields: GenerationFields) -> Grammar:
    form = fields.form
    if "choice" in form.model_fields_set:
        return Grammar(kind="choice", choices=tuple(form.choice))
    if "regex" in form.model_fields_set:
        return Grammar(kind="regex", text=form.regex)
    schema = form.json_schema
    return Grammar(kind="json", text=schema if isinstance(schema, str) else msgspec.json.encode(schema).decode())


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
