"""Turns a few-shot request into a prompt: its own shots or selected ones, the query, and a template that writes them.

Every few-shot route calls `assemble`, so support sets, strategies and templates have the same meaning in all of them.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.config import FlamingoConfig
from server.errors import ContextLengthExceeded, InvalidRequest
from server.fewshot.retrieval import SPACES, SimilarityQuery, compared_text
from server.fewshot.shots import (
    SUPPORT_SET,
    ShotSelection,
    ShotSource,
    UsedShot,
    check_media,
    check_request_shots,
    media_fields,
    request_shots,
)
from server.fewshot.templates import Query, Shot, Template, TemplateError, built_in, placeholders, with_end
from server.media.source import EncodedMedia
from server.prompt import PreparedPrompt, encode_segments
from server.schemas.fewshot import ExamplesFields, FewShotFields, TemplateChoice
from server.served_model import ServedModel
from server.store.records import SupportSet

# takes the position of a query's text: only whole blocks before it stay in the prefix cache
ANY_QUERY = Query(text="?", question="?")


@dataclass(frozen=True, slots=True, kw_only=True)
class AssembledPrompt:
    """A prompt and its parts; `shots` and `used` describe the same shots, in prompt order."""

    prompt: PreparedPrompt
    used: list[UsedShot]
    template: Template
    shots: list[Shot]
    query: Query
    support_set: SupportSet | None = None
    examples: ExamplesFields | None = None
    num_left_out: int = 0

    def report(self) -> dict[str, Any]:
        """Return the field `fewshot` of an answer."""
        return {
            "template": self.template.name,
            "strategy": self.examples.strategy if self.examples else None,
            "support_set": self.support_set.id if self.support_set else None,
            "version": self.support_set.version if self.support_set else None,
            "shots": [{"id": shot.id, "score": shot.score, "label": shot.label or None} for shot in self.used],
            "shots_left_out": self.num_left_out,
        }

    def usage(self) -> dict[str, Any]:
        """Return the fields of `usage.fewshot_details` that describe the shots."""
        return {
            "shots_used": len(self.used),
            "support_set": self.support_set.id if self.support_set else None,
            "version": self.support_set.version if self.support_set else None,
        }


async def assemble(
    fields: FewShotFields, model: ServedModel, source: ShotSource, *, room: int = 0, without: Collection[str] = ()
) -> AssembledPrompt:
    """Assemble the prompt of a few-shot request.

    `room`: tokens that `truncate_shots` leaves free. `without`: ids of examples that may not become shots.
    Raises `InvalidRequest` that names the field at fault, and errors of the support set, its media and the engine.
    """
    if fields.shots and fields.examples is not None:
        raise InvalidRequest("shots and examples exclude each other: set only one of them", param="examples")
    template = find_template(fields.template, model.config)
    _check_query(fields, template)
    check_request_shots(fields, template)
    media = await source.read_media(media_fields(fields))
    if fields.examples is None:
        selection = request_shots(fields, media)
    else:
        compared = SimilarityQuery(media=media["query"], text=compared_text(fields.query.question, fields.query.text))
        selection = await source.select(
            fields.examples, template, compared, is_text_only=fields.zero_shot, without=without
        )
    query = Query(
        media=tuple(item.digest for item in media["query"]), text=fields.query.text, question=fields.query.question
    )
    _check_num_media(selection, query, source.intake.settings.max_media_per_request, _shots_param(fields))
    # tokenizing a long text would block the event loop
    all_media = {**selection.media, **{item.digest: item for item in media["query"]}}
    return await asyncio.to_thread(_fit, fields, selection, query, template, all_media, model, room)


async def assemble_prefix(
    support_set: SupportSet, choice: TemplateChoice, k: int | None, model: ServedModel, source: ShotSource
) -> PreparedPrompt:
    """Return the beginning of a prompt with the first `k` examples; None: as many as a request without `k` uses.

    All shots of a later request with the strategy "first" and the same template and `k` are then in the prefix cache.
    Raises `InvalidRequest` for examples that do not fit the template, and `ContextLengthExceeded`.
    """
    template = find_template(choice, model.config)
    fields = ExamplesFields(support_set=support_set.id, version=support_set.version, k=k, order="stored")
    try:
        selection = await source.select(fields, template, SimilarityQuery(media=(), text=""))
    except InvalidRequest as error:
        error.param = "k" if error.param == "examples.k" else "template"
        raise
    prompt = write(template, selection.shots, ANY_QUERY, selection.media, model)
    if prompt.num_tokens > model.max_model_len:
        num_shots = len(selection.shots)
        message = f"{num_shots} shots have {prompt.num_tokens} tokens, the model reads at most {model.max_model_len}"
        raise ContextLengthExceeded(message, param="k")
    return prompt


def write(
    template: Template,
    shots: Sequence[Shot],
    query: Query,
    media: Mapping[bytes, EncodedMedia],
    model: ServedModel,
) -> PreparedPrompt:
    """Write shots in any order before any query. Raises `InvalidRequest` for a prompt that cannot be written."""
    try:
        segments = template.render(shots, query)
    except TemplateError as error:
        raise _refusal(error) from None
    return encode_segments(segments, media, model.tokenizer, "query")


def find_template(choice: TemplateChoice, config: FlamingoConfig) -> Template:
    """Return the template that a client names or defines, for this model. Raises `InvalidRequest`."""
    known = built_in(config)
    if isinstance(choice, str):
        if choice not in known:
            raise InvalidRequest(f"unknown template {choice!r}, known are {', '.join(known)}", param="template")
        return known[choice]
    try:
        return with_end(Template(name="custom", **choice.model_dump()), config.prompt)
    except TemplateError as error:
        raise InvalidRequest(f"template.{error}", param="template") from None


def _check_query(fields: FewShotFields, template: Template) -> None:
    """Check that the query has the fields of the template, and no other field unless the strategy compares it."""
    query = fields.query
    check_media(bool(query.parts()), "query", template, "the query")
    compares = fields.examples is not None and "text" in SPACES.get(fields.examples.strategy, ())
    for name, value in (("question", query.question), ("text", query.text)):
        is_written = name in placeholders(template.beginning)
        if is_written and not value:
            message = f"the template {template.name!r} has {{{name}}}, but the query has none"
            raise InvalidRequest(message, param="query")
        if value and not is_written and not compares:
            raise InvalidRequest(f"the template {template.name!r} has no {{{name}}}", param=f"query.{name}")


def _check_num_media(selection: ShotSelection, query: Query, limit: int, param: str) -> None:
    num_media = len(query.media) + sum(len(shot.media) for shot in selection.shots)
    if num_media > limit:
        message = f"{num_media} images and videos in {len(selection.shots)} shots and the query, the limit is {limit}"
        raise InvalidRequest(message, param=param)


def _shots_param(fields: FewShotFields) -> str:
    return "shots" if fields.examples is None else "examples.k"


def _fit(
    fields: FewShotFields,
    selection: ShotSelection,
    query: Query,
    template: Template,
    media: Mapping[bytes, EncodedMedia],
    model: ServedModel,
    room: int,
) -> AssembledPrompt:
    """Write the prompt with all shots or, if requested, without the first shots that exceed the model's context."""
    _check_shots(template, selection, query)

    def prompt(num_left_out: int) -> PreparedPrompt:
        return write(template, selection.shots[num_left_out:], query, media, model)

    def fits(num_left_out: int) -> bool:
        return prompt(num_left_out).num_tokens + room <= model.max_model_len

    left_out = bisect_left(range(len(selection.shots)), True, key=fits) if fields.truncate_shots else 0
    whole = prompt(left_out)
    if whole.num_tokens > model.max_model_len:
        raise ContextLengthExceeded(
            f"the prompt has {whole.num_tokens} tokens with its {len(selection.shots)} shots and "
            f"{prompt(len(selection.shots)).num_tokens} without, the model reads at most {model.max_model_len}",
            param=_shots_param(fields) if selection.shots else "query",
        )
    return AssembledPrompt(
        prompt=whole,
        used=selection.used[left_out:],
        template=template,
        shots=selection.shots[left_out:],
        query=query,
        support_set=selection.support_set,
        examples=fields.examples,
        num_left_out=left_out,
    )


def _check_shots(template: Template, selection: ShotSelection, query: Query) -> None:
    """Check that each shot has the fields of the template. Raises `InvalidRequest` that names the shot or example."""
    try:
        template.render(selection.shots, query)
    except TemplateError as error:
        if error.shot is None or selection.support_set is None:
            raise _refusal(error) from None
        example_id = selection.used[error.shot].id
        raise InvalidRequest(f"{error} (the example {example_id!r})", param=SUPPORT_SET) from None


def _refusal(error: TemplateError) -> InvalidRequest:
    return InvalidRequest(str(error), param="query" if error.shot is None else f"shots[{error.shot}]")
