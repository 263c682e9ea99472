"""Turns the fields of a request into one frozen `GenerationRequest`, for every route that generates.

Checks that concern more than one field are made here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from server.errors import InvalidRequest, UnsupportedParameter
from server.fewshot.templates import Template
from server.grammar import GrammarError
from server.grammar.compiler import check, num_bytes
from server.prompt import PreparedPrompt, check_token_ids
from server.schemas.generation import BEAM_WIDTH, CompletionFields, GenerationFields, StructuredOutputs
from server.served_model import ServedModel
from server.wire import Grammar, Sampling

# bytes of the structured outputs, summed over all prompts of a request
MAX_COPIED_BYTES = 2**24
# log-probabilities of prompts in one request, of about 110 bytes each
MAX_PROMPT_LOGPROBS = 2**21
# fields that have no effect on a beam search, which samples nothing and ranks by the model's own log-probabilities, with
# their neutral values
WITHOUT_BEAM_SEARCH: Mapping[str, Sequence[Any]] = {
    "temperature": (0, 1),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
}
WITH_BEAM_SEARCH = ("length_penalty", "early_stopping")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A prompt, the parameters of its answers, and what of it the response shows.

    `lead` is removed from the beginning of an answer: the space between question and answer, which the model writes.
    """

    prompt: PreparedPrompt
    sampling: Sampling
    stop: Sequence[str] = ()
    include_stop: bool = False
    lead: str = ""
    echo: bool = False
    shows_prompt_logprobs: bool = False
    shows_token_ids: bool = False


def completion_requests(
    fields: CompletionFields,
    prompts: Sequence[PreparedPrompt],
    model: ServedModel,
    *,
    template: Template | None = None,
    form_field: str = "structured_outputs",
) -> list[GenerationRequest]:
    """Return the generation request for each of the prepared prompts. Raises `InvalidRequest`.

    `template`: the template of the prompts, if they have one. `form_field`: the name of the field that the client sent for
    `structured_outputs`.
    """
    _check_stream_options(fields)
    stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop
    stop_token_ids = check_token_ids(fields.stop_token_ids, model, "stop_token_ids")
    lead = ""
    if template:
        lead, end_of_chunk = template.lead, model.config.prompt.end_of_chunk
        if template.end and "stop" not in fields.model_fields_set:
            stop = [template.end]
        if not template.end and end_of_chunk not in model.config.prompt.eos:
            stop_token_ids = [*stop_token_ids, model.tokenizer.id_of(end_of_chunk)]
    sampling = _sampling(fields, model, stop_token_ids, _grammar(fields, lead, form_field, len(prompts)))
    if sampling.prompt_logprobs is not None:
        _check_prompt_logprobs(fields, sampling.prompt_logprobs, prompts)
    return [
        GenerationRequest(
            prompt=prompt,
            sampling=msgspec.structs.replace(sampling, max_tokens=_max_tokens(fields, prompt, model)),
            stop=stop,
            include_stop=fields.include_stop_str_in_output,
            lead=lead,
            echo=fields.echo,
            shows_prompt_logprobs=fields.prompt_logprobs is not None,
            shows_token_ids=fields.return_token_ids,
        )
        for prompt in prompts
    ]


def _check_prompt_logprobs(fields: CompletionFields, num_top: int, prompts: Sequence[PreparedPrompt]) -> None:
    """Check that the prompts have log-probabilities, and their number: each takes memory until the end of the request.

    Each answer shows those of its prompt. Raises `InvalidRequest`.
    """
    if any(prompt.encoded.has_spans for prompt in prompts):
        message = "a prompt whose shots attend alone has no log-probabilities: its tokens do not follow one another"
        raise UnsupportedParameter(message, param="echo" if fields.prompt_logprobs is None else "prompt_logprobs")
    count = sum(prompt.num_tokens for prompt in prompts) * (num_top + 1) * fields.n
    if count > MAX_PROMPT_LOGPROBS:
        message = f"the prompts would have {count} log-probabilities, the limit is {MAX_PROMPT_LOGPROBS}"
        name = "logprobs" if fields.prompt_logprobs is None else "prompt_logprobs"
        raise InvalidRequest(f"{message}: request fewer alternatives, or send fewer prompts", param=name)


def _max_tokens(fields: CompletionFields, prompt: PreparedPrompt, model: ServedModel) -> int:
    """Return the number of tokens to generate after a prompt. Raises `InvalidRequest`.

    If the context has too little room, the default of `max_tokens` is reduced, but a requested value is refused.
    """
    max_tokens = fields.max_tokens
    if "max_tokens" not in fields.model_fields_set:
        max_tokens = min(max_tokens, max(0, model.max_model_len - prompt.num_tokens))
    prompt.check_room(max_tokens, "max_tokens is", "max_tokens", model)
    if fields.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {fields.min_tokens}, more than max_tokens {max_tokens}", param="min_tokens"
        )
    return max_tokens


def _sampling(
    fields: CompletionFields, model: ServedModel, stop_token_ids: Sequence[int], grammar: Grammar | None
) -> Sampling:
    """Return the sampling parameters for the engine, the same for all prompts of a request. Raises `InvalidRequest`."""
    # an echoed prompt also shows its log-probabilities
    counts = [fields.prompt_logprobs, fields.logprobs if fields.echo else None]
    return Sampling(
        max_tokens=fields.max_tokens,
        min_tokens=fields.min_tokens,
        temperature=fields.temperature,
        top_p=fields.top_p,
        top_k=max(fields.top_k, 0),
        min_p=fields.min_p,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        repetition_penalty=fields.repetition_penalty,
        logit_bias=_logit_bias(fields, model),
        seed=fields.seed,
        ignore_eos=fields.ignore_eos,
        stop_token_ids=tuple(stop_token_ids),
        logprobs=fields.logprobs,
        prompt_logprobs=max((count for count in counts if count is not None), default=None),
        n=fields.n,
        beam_width=_beam_width(fields),
        length_penalty=fields.length_penalty,
        early_stopping=fields.early_stopping,
        grammar=grammar,
    )


def _check_stream_options(fields: GenerationFields) -> None:
    """Refuse options of a stream for a request without one. Raises `UnsupportedParameter`."""
    for name in ("include_usage", "continuous_usage_stats"):
        if getattr(fields.stream_options, name) and not fields.stream:
            raise UnsupportedParameter(f"stream_options.{name} needs stream", param=f"stream_options.{name}")


def _beam_width(fields: GenerationFields) -> int:
    """Return the number of beams, 0 without a beam search. Raises `InvalidRequest`, also for fields without effect.

    A search keeps `best_of` beams and returns the `n` best.
    """
    if not fields.use_beam_search:
        for name in WITH_BEAM_SEARCH:
            if getattr(fields, name) != GenerationFields.model_fields[name].default:
                raise UnsupportedParameter(f"{name} needs use_beam_search", param=name)
        if fields.best_of not in (None, fields.n):
            raise UnsupportedParameter("best_of other than n needs use_beam_search", param="best_of")
        return 0
    for name, accepted in WITHOUT_BEAM_SEARCH.items():
        if getattr(fields, name) not in accepted:
            message = f"{name} cannot be combined with use_beam_search, which accepts {_written(accepted)}"
            raise UnsupportedParameter(message, param=name)
    width = max(BEAM_WIDTH, fields.n) if fields.best_of is None else fields.best_of
    if width < fields.n:
        raise InvalidRequest(f"best_of is {width}, less than n {fields.n}", param="best_of")
    return width


def _written(accepted: Sequence[Any]) -> str:
    return "only " + " or ".join(msgspec.json.encode(value).decode() for value in accepted)


def _grammar(fields: GenerationFields, lead: str, form_field: str, num_prompts: int) -> Grammar | None:
    """Return the grammar of the answers, if they have one; each prompt gets a copy of it. Raises `InvalidRequest`."""
    form = fields.structured_outputs
    if form is None:
        return None
    if len(form.model_fields_set) != 1:
        raise InvalidRequest(
            "structured_outputs needs exactly one of choice, regex and json", param="structured_outputs"
        )
    if fields.use_beam_search:
        raise UnsupportedParameter(f"{form_field} cannot be combined with use_beam_search", param=form_field)
    grammar = msgspec.structs.replace(_read_form(form, lead), field=form_field)
    try:
        check(grammar)
    except GrammarError as error:
        raise InvalidRequest(f"{form_field}: {error}", param=form_field) from None
    if (size := num_prompts * num_bytes(grammar)) > MAX_COPIED_BYTES:
        message = f"{form_field} for each of {num_prompts} prompts has {size} bytes, more than {MAX_COPIED_BYTES}"
        raise InvalidRequest(message, param=form_field)
    return grammar


def _read_form(form: StructuredOutputs, lead: str) -> Grammar:
    """Return the grammar of lead and answer; JSON has no lead."""
    if "choice" in form.model_fields_set:
        return Grammar(kind="choice", choices=tuple(lead + choice for choice in form.choice))
    if "regex" in form.model_fields_set:
        return Grammar(kind="regex", text=f"{re.escape(lead)}(?:{form.regex})" if lead and form.regex else form.regex)
    schema = form.json_schema
    return Grammar(kind="json", text=schema if isinstance(schema, str) else msgspec.json.encode(schema).decode())


def _logit_bias(fields: GenerationFields, model: ServedModel) -> dict[int, float]:
    """Return the biases by token id; a key in JSON is the id as a decimal string. Raises `InvalidRequest`."""
    for key in fields.logit_bias:
        # no other spelling of an id: two keys for one token would be one bias
        if not (key.isascii() and key.isdigit() and len(key) < 10) or key != str(int(key)):
            raise InvalidRequest(f"logit_bias: {key[:32]!r} is not a token id", param="logit_bias")
        if int(key) >= (size := model.config.language_model.num_token_ids):
            message = f"logit_bias: token id {key} is not below the vocabulary's size {size}"
            raise InvalidRequest(message, param="logit_bias")
    return {int(key): bias for key, bias in fields.logit_bias.items()}
