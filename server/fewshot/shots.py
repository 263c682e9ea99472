"""Reads the shots of a request: its own, or examples of a support set that a strategy selects.

Both become a `ShotSelection`, so that later steps treat them alike.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from server.errors import InvalidRequest, ServerError, SupportSetNotFound
from server.fewshot.retrieval import Retrieval, SimilarityQuery
from server.fewshot.selection import SIMILARITY, Selected, SelectionError, Similar, check, select
from server.fewshot.templates import Shot, Template, placeholders
from server.media.intake import Intake
from server.media.source import EncodedMedia
from server.schemas.fewshot import ExamplesFields, FewShotFields, MediaFields
from server.schemas.prompt import MediaPart
from server.store.records import Example, SupportSet
from server.store.support_sets import SupportSets

DEFAULT_K = 4
# the paper's "zero-shot": two examples without their images
DEFAULT_K_TEXT_ONLY = 2
SUPPORT_SET = "examples.support_set"
# the rest of a path after the short form `image` of a media part, which the client did not write
_AFTER_SHORT_FORM = re.compile(r"(?<=\.image)\.(image_url\.url|image_id|video_id)$")


@dataclass(frozen=True, slots=True)
class UsedShot:
    """A shot as the answer reports it; `score` is its similarity to the query, for strategies that compare."""

    id: str | None
    label: str
    score: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShotSelection:
    """Shots in prompt order, the report of each at the same index of `used`, and their media by digest."""

    used: list[UsedShot] = field(default_factory=list)
    shots: list[Shot] = field(default_factory=list)
    media: dict[bytes, EncodedMedia] = field(default_factory=dict)
    support_set: SupportSet | None = None


@dataclass(frozen=True, slots=True)
class ShotSource:
    """Reads the media of few-shot requests, and takes shots from support sets."""

    intake: Intake
    support_sets: SupportSets
    retrieval: Retrieval

    async def read_media(self, fields: Mapping[str, MediaFields]) -> dict[str, list[EncodedMedia]]:
        """Return the media of each field by its path. Raises the intake's errors, with the path of the client's field."""
        parts: dict[str, MediaPart] = {}
        for param, holder in fields.items():
            for number, part in enumerate(holder.parts()):
                parts[f"{param}.image" if holder.image is not None else f"{param}.media[{number}]"] = part
        try:
            read = await self.intake.read_all(parts, "shots")
        except ServerError as error:
            error.param = _AFTER_SHORT_FORM.sub("", error.param or "shots")
            raise
        for media in read.values():
            media.param = _AFTER_SHORT_FORM.sub("", media.param)
        return {param: [media for path, media in read.items() if path.startswith(f"{param}.")] for param in fields}

    async def select(
        self,
        examples: ExamplesFields,
        template: Template,
        query: SimilarityQuery,
        *,
        is_text_only: bool = False,
        without: Collection[str] = (),
    ) -> ShotSelection:
        """Select examples of a support set as shots; `without` has ids of examples that may not become shots.

        Raises `SupportSetNotFound`, and `InvalidRequest` for a selection that the set or the template does not allow.
        """
        try:
            support_set = await self.support_sets.get_version(examples.support_set, examples.version)
        except SupportSetNotFound as error:
            error.param = SUPPORT_SET
            raise
        selected = await self._select(support_set, examples, query, is_text_only=is_text_only, without=without)
        media_ids: dict[str, None] = {}
        if not is_text_only:
            for shot in selected:
                example = shot.example
                check_media(bool(example.media), SUPPORT_SET, template, f"the example {example.id!r}")
                media_ids.update(dict.fromkeys(example.media))
        media = {item.id: item for item in await self.intake.find_all(media_ids, SUPPORT_SET)}
        return ShotSelection(
            used=[UsedShot(shot.example.id, shot.example.label, shot.score) for shot in selected],
            shots=[_shot(shot.example, media) for shot in selected],
            media={item.digest: item for item in media.values()},
            support_set=support_set,
        )

    async def _select(
        self,
        support_set: SupportSet,
        fields: ExamplesFields,
        query: SimilarityQuery,
        *,
        is_text_only: bool,
        without: Collection[str],
    ) -> list[Selected[Example]]:
        """Return the selected examples in prompt order."""
        examples = support_set.examples
        excluded = {index for index, example in enumerate(examples) if example.id in without}
        num_selectable = len(examples) - len(excluded)
        default = min(DEFAULT_K_TEXT_ONLY if is_text_only else DEFAULT_K, num_selectable)
        k = default if fields.k is None else fields.k
        similar: list[Similar] = []
        try:
            check(fields.strategy, num_selectable, k, fields.order)
            if fields.strategy in SIMILARITY and k:
                num_ranked = k + len(excluded)
                similar = await self.retrieval.most_similar(support_set, fields.strategy, query, num_ranked)
            return select(
                fields.strategy,
                examples,
                k,
                seed=fields.seed,
                order=fields.order,
                similar=similar,
                without=excluded,
            )
        except SelectionError as error:
            raise InvalidRequest(str(error), param=f"examples.{error.field}") from None


def check_request_shots(fields: FewShotFields, template: Template) -> None:
    """Check the request's own shots before any media is read. Raises `InvalidRequest`."""
    for number, shot in enumerate(fields.shots):
        param = f"shots[{number}]"
        if not fields.zero_shot:
            check_media(bool(shot.parts()), param, template)
        if shot.question and "question" not in placeholders(template.shot):
            raise InvalidRequest(f"the template {template.name!r} has no {{question}}", param=f"{param}.question")


def request_shots(fields: FewShotFields, media: Mapping[str, list[EncodedMedia]]) -> ShotSelection:
    """Return the request's own shots; `media` has those of each by its path in the request."""
    return ShotSelection(
        used=[UsedShot(shot.id, shot.label) for shot in fields.shots],
        shots=[
            Shot(
                media=tuple(item.digest for item in media.get(f"shots[{number}]", ())),
                text=shot.text,
                question=shot.question,
                label=shot.label,
            )
            for number, shot in enumerate(fields.shots)
        ],
        media={item.digest: item for items in media.values() for item in items},
    )


def media_fields(fields: FewShotFields) -> dict[str, MediaFields]:
    """Return the fields whose media are read, by their path in the request."""
    shots = {} if fields.zero_shot else {f"shots[{number}]": shot for number, shot in enumerate(fields.shots)}
    return {**shots, "query": fields.query}


def check_media(has_media: bool, param: str, template: Template, owner: str = "") -> None:
    """Check for media where the template has them: a text without media of its own would read another's."""
    if template.has_media and not has_media:
        message = f"the template {template.name!r} has {{media}}, but {owner or param} has none"
        raise InvalidRequest(message, param=param)
    if not template.has_media and has_media:
        message = f"the template {template.name!r} has no {{media}}, but {owner or param} has media"
        raise InvalidRequest(message, param=param)


def _shot(example: Example, media: Mapping[str, EncodedMedia]) -> Shot:
    """Return the example as a shot, with those of its media that were read."""
    return Shot(
        media=tuple(media[media_id].digest for media_id in example.media if media_id in media),
        text=example.text,
        question=example.question,
        label=example.label,
    )
