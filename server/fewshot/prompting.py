"""A few-shot request becomes a prompt: shots given or chosen, the query, and a template that writes them.

Every route that shows shots comes through `assemble`, so a support set, a strategy and a template mean the same to all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from model.config import FlamingoConfig
from model.prompt import PromptError, encode
from model.tokenizer import PromptTokenizer
from server.api.prompts import ReadPrompt
from server.api.schemas import MediaPart
from server.api.schemas_fewshot import FewShotFields, Shown, TemplateChoice
from server.api.services import Services
from server.errors import InvalidRequest, ServerError
from server.fewshot.templates import Query, Shot, Template, TemplateError, built_in, places, with_end
from server.media.source import EncodedMedia

_BEHIND_SHORT_FORM = re.compile(r"(?<=\.image)\.(image_url\.url|image_id|video_id)$")


@dataclass(frozen=True, slots=True)
class Used:
    """A shot as the answer tells of it."""

    id: str | None
    label: str
    score: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """A prompt and what it was made of. `shots` and `used` stand side by side, in prompt order."""

    prompt: ReadPrompt
    used: list[Used]
    template: Template
    shots: list[Shot]
    query: Query


def write(
    template: Template,
    shots: Sequence[Shot],
    query: Query,
    media: Mapping[bytes, EncodedMedia],
    tokenizer: PromptTokenizer,
) -> ReadPrompt:
    """Any shots in any order before any query. Raises `InvalidRequest` for what the template or the model cannot show."""
    try:
        encoded = encode(template.render(shots, query), tokenizer)
    except TemplateError as error:
        raise InvalidRequest(str(error), param="query" if error.shot is None else f"shots[{error.shot}]") from None
    except PromptError as error:
        raise InvalidRequest(str(error), param="query") from None
    return ReadPrompt(encoded, {digest: media[digest] for digest in encoded.media})


async def assemble(fields: FewShotFields, services: Services, *, without: Collection[str] = ()) -> Assembled:
    """`without`: ids of examples that may not become shots. Raises `InvalidRequest` that names the field at fault."""
    if fields.shots and fields.examples is not None:
        raise InvalidRequest("shots and examples are two ways to the same: give one", param="examples")
    if fields.examples is not None:
        raise InvalidRequest("there are no support sets yet", param="examples")
    template = template_of(fields.template, services.model.config)
    _check_shown(fields, template)
    media = await _read_media(_given_parts(fields), services)
    digests = {place: [m.digest for m in found] for place, found in media.items()}
    query = Query(media=tuple(digests["query"]), text=fields.query.text, question=fields.query.question)
    shots = [
        Shot(media=tuple(digests.get(f"shots[{i}]", ())), text=shot.text, question=shot.question, label=shot.label)
        for i, shot in enumerate(fields.shots)
    ]
    used = [Used(shot.id, shot.label) for shot in fields.shots]
    by_digest = {m.digest: m for found in media.values() for m in found}
    prompt = write(template, shots, query, by_digest, services.model.tokenizer)
    return Assembled(prompt=prompt, used=used, template=template, shots=shots, query=query)


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


def _check_shown(fields: FewShotFields, template: Template) -> None:
    """Media stand where the template shows them, in the query and in each shot: text would else read another's."""
    _check_media(fields.query, "query", template)
    if "question" not in places(template.beginning) and fields.query.question:
        raise InvalidRequest(f"the template {template.name!r} shows no {{question}}", param="query.question")
    if not fields.zero_shot:
        for number, shot in enumerate(fields.shots):
            _check_media(shot, f"shots[{number}]", template)


def _check_media(shown: Shown, param: str, template: Template) -> None:
    if template.has_media and not shown.parts():
        raise InvalidRequest(f"the template {template.name!r} shows {{media}}, and {param} has none", param=param)
    if not template.has_media and shown.parts():
        raise InvalidRequest(f"the template {template.name!r} shows no {{media}}, and {param} has some", param=param)


def _given_parts(fields: FewShotFields) -> dict[str, Shown]:
    shots = {} if fields.zero_shot else {f"shots[{number}]": shot for number, shot in enumerate(fields.shots)}
    return {**shots, "query": fields.query}


async def _read_media(shown: Mapping[str, Shown], services: Services) -> dict[str, list[EncodedMedia]]:
    """Media of the query and of each shot, by where they stand in the request."""
    parts: dict[str, MediaPart] = {}
    for param, holder in shown.items():
        for number, part in enumerate(holder.parts()):
            parts[f"{param}.image" if holder.image is not None else f"{param}.media[{number}]"] = part
    try:
        found = await services.media.read_all(parts, "shots")
    except ServerError as error:
        error.param = _as_sent(error.param or "shots")
        raise
    for media in found.values():
        media.param = _as_sent(media.param)
    return {param: [media for place, media in found.items() if place.startswith(f"{param}.")] for param in shown}


def _as_sent(param: str) -> str:
    """A short form is read as the part that it is short for; the client knows it by `image` alone."""
    return _BEHIND_SHORT_FORM.sub("", param)
