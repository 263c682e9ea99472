"""A few-shot request becomes a prompt: shots given or chosen, the query, and a template that writes them.

Every route that shows shots comes through `assemble`, so a support set, a strategy and a template mean the same to all.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.config import FlamingoConfig
from model.prompt import PromptError, encode
from model.tokenizer import PromptTokenizer
from server.errors import ContextLengthExceeded, InvalidRequest
from server.fewshot.retrieval import SPACES, SimilarityQuery, compared_text
from server.fewshot.shots import (
    SUPPORT_SET,
    FoundShots,
    UsedShot,
    check_given,
    check_media,
    chosen_shots,
    given_shots,
    read_given,
    shown_in,
)
from server.fewshot.templates import Query, Shot, Template, TemplateError, built_in, places, with_end
from server.media.source import EncodedMedia
from server.read_prompt import PreparedPrompt
from server.schemas.fewshot import ExamplesFields, FewShotFields, TemplateChoice
from server.served_model import ServedModel
from server.services import Services
from server.store.records import SupportSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """A prompt and what it was made of. `shots` and `used` stand side by side, in prompt order."""

    prompt: PreparedPrompt
    used: list[UsedShot]
    template: Template
    shots: list[Shot]
    query: Query
    support_set: SupportSet | None = None
    examples: ExamplesFields | None = None
    num_left_out: int = 0

    def told(self) -> dict[str, Any]:
        """The `fewshot` of an answer."""
        return {
            "template": self.template.name,
            "strategy": self.examples.strategy if self.examples else None,
            "support_set": self.support_set.id if self.support_set else None,
            "version": self.support_set.version if self.support_set else None,
            "shots": [{"id": used.id, "score": used.score, "label": used.label or None} for used in self.used],
            "shots_left_out": self.num_left_out,
        }

    def usage(self) -> dict[str, Any]:
        """What an answer's `usage.fewshot_details` says besides media."""
        return {
            "shots_used": len(self.used),
            "support_set": self.support_set.id if self.support_set else None,
            "version": self.support_set.version if self.support_set else None,
        }


async def assemble(
    fields: FewShotFields, services: Services, *, room: int = 0, without: Collection[str] = ()
) -> Assembled:
    """`room`: tokens that `truncate_shots` leaves free. `without`: ids of examples that may not become shots.

    Raises `InvalidRequest` that names the field at fault, and what a support set, its media and the engine raise.
    """
    if fields.shots and fields.examples is not None:
        raise InvalidRequest("shots and examples are two ways to the same: give one", param="examples")
    template = template_of(fields.template, services.model.config)
    _check_query(fields, template)
    check_given(fields, template)
    given = await read_given(shown_in(fields), services)
    asked = SimilarityQuery(media=given["query"], text=compared_text(fields.query.question, fields.query.text))
    if fields.examples is None:
        found = given_shots(fields, given)
    else:
        found = await chosen_shots(fields, fields.examples, template, asked, services, without)
    digests = tuple(one.digest for one in asked.media)
    query = Query(media=digests, text=fields.query.text, question=fields.query.question)
    _check_num_media(found, query, services.settings.max_media_per_request, _shots_param(fields))
    media = {**found.media, **{one.digest: one for one in asked.media}}
    # long texts take a while to become tokens
    return await asyncio.to_thread(_fitted, fields, found, query, template, media, services.model, room)


def write(
    template: Template,
    shots: Sequence[Shot],
    query: Query,
    media: Mapping[bytes, EncodedMedia],
    tokenizer: PromptTokenizer,
) -> PreparedPrompt:
    """Any shots in any order before any query. Raises `InvalidRequest` for what the template or the model cannot show."""
    try:
        encoded = encode(template.render(shots, query), tokenizer)
    except TemplateError as error:
        raise _refusal(error) from None
    except PromptError as error:
        raise InvalidRequest(str(error), param="query") from None
    return PreparedPrompt(encoded, {digest: media[digest] for digest in encoded.media})


def template_of(choice: TemplateChoice, config: FlamingoConfig) -> Template:
    """A template by name or of the client's own, for this model. Raises `InvalidRequest`."""
    known = built_in(config)
    if isinstance(choice, str):
        if choice not in known:
            raise InvalidRequest(f"there is no template {choice!r}, only {', '.join(known)}", param="template")
        return with_end(known[choice], config.prompt)
    try:
        return with_end(Template(name="custom", **choice.model_dump()), config.prompt)
    except TemplateError as error:
        raise InvalidRequest(f"template.{error}", param="template") from None


def _check_query(fields: FewShotFields, template: Template) -> None:
    """What the template shows is there; what is there is shown, or compared with, or it would have no meaning."""
    query = fields.query
    check_media(bool(query.parts()), "query", template, "the query")
    compares = fields.examples is not None and "text" in SPACES.get(fields.examples.strategy, ())
    for name, value in (("question", query.question), ("text", query.text)):
        is_shown = name in places(template.beginning)
        if is_shown and not value:
            raise InvalidRequest(
                f"the template {template.name!r} shows {{{name}}}, and the query has none", param="query"
            )
        if value and not is_shown and not compares:
            raise InvalidRequest(f"the template {template.name!r} shows no {{{name}}}", param=f"query.{name}")


def _check_num_media(found: FoundShots, query: Query, limit: int, param: str) -> None:
    num_media = len(query.media) + sum(len(shot.media) for shot in found.shots)
    if num_media > limit:
        message = f"{num_media} images and videos in {len(found.shots)} shots and the query, the limit is {limit}"
        raise InvalidRequest(message, param=param)


def _shots_param(fields: FewShotFields) -> str:
    return "shots" if fields.examples is None else "examples.k"


def _fitted(
    fields: FewShotFields,
    found: FoundShots,
    query: Query,
    template: Template,
    media: Mapping[bytes, EncodedMedia],
    model: ServedModel,
    room: int,
) -> Assembled:
    """With all shots, or, if that was asked for, without the first ones that the model's context has no room for."""
    _check_values(template, found, query)

    def prompt(num_left_out: int) -> PreparedPrompt:
        return write(template, found.shots[num_left_out:], query, media, model.tokenizer)

    def fits(num_left_out: int) -> bool:
        return prompt(num_left_out).num_tokens + room <= model.max_model_len

    left_out = bisect_left(range(len(found.shots)), True, key=fits) if fields.truncate_shots else 0
    whole = prompt(left_out)
    if whole.num_tokens > model.max_model_len:
        raise ContextLengthExceeded(
            f"the prompt has {whole.num_tokens} tokens with its {len(found.shots)} shots and "
            f"{prompt(len(found.shots)).num_tokens} without, this model reads {model.max_model_len}",
            param=_shots_param(fields) if found.shots else "query",
        )
    return Assembled(
        prompt=whole,
        used=found.used[left_out:],
        template=template,
        shots=found.shots[left_out:],
        query=query,
        support_set=found.support_set,
        examples=fields.examples,
        num_left_out=left_out,
    )


def _check_values(template: Template, found: FoundShots, query: Query) -> None:
    """A shot without what the template shows is named as the client knows it."""
    try:
        template.render(found.shots, query)
    except TemplateError as error:
        if error.shot is None or found.support_set is None:
            raise _refusal(error) from None
        example = found.used[error.shot].id
        raise InvalidRequest(f"{error}: it is the example {example!r}", param=SUPPORT_SET) from None


def _refusal(error: TemplateError) -> InvalidRequest:
    return InvalidRequest(str(error), param="query" if error.shot is None else f"shots[{error.shot}]")
