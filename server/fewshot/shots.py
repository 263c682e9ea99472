"""Where shots come from: worked ones in the request, or examples of a support set that a strategy chooses.

Both end as the same thing, so that nobody behind can tell them apart.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from server.errors import InvalidRequest, ServerError, SupportSetNotFound
from server.fewshot.retrieval import SimilarityQuery
from server.fewshot.selection import SIMILARITY, Chosen, SelectionError, Similar, check, select
from server.fewshot.templates import Shot, Template, places
from server.media.source import EncodedMedia
from server.schemas.fewshot import ExamplesFields, FewShotFields, MediaFields
from server.schemas.media import MediaPart
from server.services import Services
from server.store.records import Example, SupportSet

DEFAULT_K = 4
# the paper's "zero-shot": two examples without their pictures
DEFAULT_K_TEXT_ONLY = 2
SUPPORT_SET = "examples.support_set"
# behind the short form of a media part, which the client knows by `image` alone
_BEHIND_SHORT_FORM = re.compile(r"(?<=\.image)\.(image_url\.url|image_id|video_id)$")


@dataclass(frozen=True, slots=True)
class UsedShot:
    """A shot as the answer tells of it. `score`: its similarity to the query, where a strategy has looked at it."""

    id: str | None
    label: str
    score: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundShots:
    """In prompt order, `used` and `shots` side by side, with the bytes behind their media."""

    used: list[UsedShot] = field(default_factory=list)
    shots: list[Shot] = field(default_factory=list)
    media: dict[bytes, EncodedMedia] = field(default_factory=dict)
    support_set: SupportSet | None = None


def check_given(fields: FewShotFields, template: Template) -> None:
    """What can be refused before any media is read."""
    for number, given in enumerate(fields.shots):
        param = f"shots[{number}]"
        if not fields.zero_shot:
            check_media(bool(given.parts()), param, template)
        if given.question and "question" not in places(template.shot):
            raise InvalidRequest(f"the template {template.name!r} shows no {{question}}", param=f"{param}.question")


def given_shots(fields: FewShotFields, media: Mapping[str, list[EncodedMedia]]) -> FoundShots:
    """`media`: of each shot, by where it stands in the request."""
    return FoundShots(
        used=[UsedShot(given.id, given.label) for given in fields.shots],
        shots=[
            Shot(
                media=tuple(one.digest for one in media.get(f"shots[{number}]", ())),
                text=given.text,
                question=given.question,
                label=given.label,
            )
            for number, given in enumerate(fields.shots)
        ],
        media={one.digest: one for found in media.values() for one in found},
    )


def shown_in(fields: FewShotFields) -> dict[str, MediaFields]:
    """What shows media that are read, by where it stands in the request."""
    shots = {} if fields.zero_shot else {f"shots[{number}]": shot for number, shot in enumerate(fields.shots)}
    return {**shots, "query": fields.query}


async def read_given(shown: Mapping[str, MediaFields], services: Services) -> dict[str, list[EncodedMedia]]:
    """The media of each. Raises what the intake raises, with the client's own name of what is at fault."""
    parts: dict[str, MediaPart] = {}
    for param, holder in shown.items():
        for number, part in enumerate(holder.parts()):
            parts[f"{param}.image" if holder.image is not None else f"{param}.media[{number}]"] = part
    try:
        found = await services.media.read_all(parts, "shots")
    except ServerError as error:
        error.param = _BEHIND_SHORT_FORM.sub("", error.param or "shots")
        raise
    for media in found.values():
        media.param = _BEHIND_SHORT_FORM.sub("", media.param)
    return {param: [media for place, media in found.items() if place.startswith(f"{param}.")] for param in shown}


# shots out of a support set


async def chosen_shots(
    fields: FewShotFields,
    wanted: ExamplesFields,
    template: Template,
    asked: SimilarityQuery,
    services: Services,
    without: Collection[str],
) -> FoundShots:
    try:
        support_set = await services.support_sets.get_version(wanted.support_set, wanted.version)
    except SupportSetNotFound as error:
        error.param = SUPPORT_SET
        raise
    chosen = await choose(support_set, wanted, asked, services, is_text_only=fields.zero_shot, without=without)
    examples = [one.example for one in chosen]
    if not fields.zero_shot:
        for example in examples:
            check_media(bool(example.media), SUPPORT_SET, template, f"the example {example.id!r}")
    names = {} if fields.zero_shot else dict.fromkeys(name for example in examples for name in example.media)
    media = await services.media.find_all(names, SUPPORT_SET)
    digests = {one.id: one.digest for one in media}
    return FoundShots(
        used=[UsedShot(one.example.id, one.example.label, one.score) for one in chosen],
        shots=[
            Shot(
                media=() if fields.zero_shot else tuple(digests[name] for name in example.media),
                text=example.text,
                question=example.question,
                label=example.label,
            )
            for example in examples
        ],
        media={one.digest: one for one in media},
        support_set=support_set,
    )


async def choose(
    support_set: SupportSet,
    wanted: ExamplesFields,
    asked: SimilarityQuery,
    services: Services,
    *,
    is_text_only: bool = False,
    without: Collection[str] = (),
) -> list[Chosen[Example]]:
    """Examples in prompt order. Raises `InvalidRequest` for a choice that the support set cannot give."""
    examples = support_set.examples
    excluded = {place for place, example in enumerate(examples) if example.id in without}
    num_others = len(examples) - len(excluded)
    default = min(DEFAULT_K_TEXT_ONLY if is_text_only else DEFAULT_K, num_others)
    k = default if wanted.k is None else wanted.k
    similar: list[Similar] = []
    try:
        check(wanted.strategy, num_others, k, wanted.order)
        if wanted.strategy in SIMILARITY and k:
            num_ranked = k + len(excluded)
            similar = await services.retrieval.most_similar(support_set, wanted.strategy, asked, num_ranked)
        return select(
            wanted.strategy,
            examples,
            k,
            seed=wanted.seed,
            order=wanted.order,
            similar=similar,
            without=excluded,
        )
    except SelectionError as error:
        raise InvalidRequest(str(error), param=f"examples.{error.field}") from None


def check_media(has_media: bool, param: str, template: Template, who: str = "") -> None:
    """Media stand wherever the template shows them: a text without its own would read another's."""
    if template.has_media and not has_media:
        raise InvalidRequest(
            f"the template {template.name!r} shows {{media}}, and {who or param} has none", param=param
        )
    if not template.has_media and has_media:
        raise InvalidRequest(
            f"the template {template.name!r} shows no {{media}}, and {who or param} has some", param=param
        )
