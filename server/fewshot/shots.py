"""Reads the shots of a request: its own, or examples of a support set that a strategy selects.

A strategy picks examples, best first; an order then arranges them. For one version of a set, a seed always gives the
same shots.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from server.concurrency import cancel
from server.errors import InvalidRequest, SupportSetNotFound
from server.fewshot.retrieval import SPACES, Retrieval, Search, SimilarityQuery
from server.fewshot.templates import Shot, Template
from server.fewshot.vector_index import Similar
from server.media.intake import Intake
from server.media.source import EncodedMedia
from server.schemas.fewshot import ExamplesFields, Order, ShotFields, ShotsFields, Strategy
from server.schemas.prompt import MediaPartOrUrl
from server.store.examples import Examples
from server.store.records import Example, SupportSet
from server.store.support_sets import SupportSets

DEFAULT_K = 4
# the paper's "zero-shot": two examples without their images
DEFAULT_K_TEXT_ONLY = 2
SUPPORT_SET = "examples.support_set"
STORE_EXAMPLES = "store examples as a support set, from which each request selects its shots"
TEXT_ONLY = '{"shot": "{question} {answer}"}'
# as in the paper, the most similar example is next to the query
DEFAULT_ORDER: dict[Strategy, Order] = {
    "first": "stored",
    "random": "as_selected",
    "balanced": "as_selected",
    **dict.fromkeys(SPACES, "similar_last"),
}


class MediaOwner(Protocol):
    """A part of a request that has media."""

    def parts(self, param: str) -> dict[str, MediaPartOrUrl]:
        """Return its media parts by their paths in the request, in which it is `param` itself."""


@dataclass(frozen=True, slots=True)
class Selected:
    """A selected example; `score` is None if the strategy does not compare examples with the query."""

    example: Example
    score: float | None = None


def place_of(example: Shot | Example) -> tuple[str, str]:
    """Return the path in the request of a shot, or of an example of its support set, and the name for a message."""
    if isinstance(example, Shot):
        return example.param, example.param
    return SUPPORT_SET, f"the example {example.id!r}"


@dataclass(frozen=True, slots=True)
class ShotSource:
    """Reads the media of few-shot requests, and takes shots from support sets."""

    intake: Intake
    support_sets: SupportSets
    retrieval: Retrieval

    async def read_media(self, owners: Mapping[str, MediaOwner], param: str = "query") -> dict[str, list[EncodedMedia]]:
        """Return the media of each owner by its path. Raises the intake's errors.

        `param` is the path of the query.
        """
        parts = {path: owner.parts(path) for path, owner in owners.items()}
        all_parts = {path: part for of in parts.values() for path, part in of.items()}
        has_shots = any(isinstance(owner, ShotFields) for owner in owners.values())
        param, remedy = ("shots", STORE_EXAMPLES) if has_shots else (param, "")
        read = await self.intake.read_all(all_parts, param, remedy=remedy)
        return {owner: [read[path] for path in of] for owner, of in parts.items()}

    async def find(self, fields: ShotsFields, query: Sequence[EncodedMedia]) -> SupportSet | None:
        """Return the version of the support set that a request names, None if it names none.

        Meanwhile, the media of the query are embedded if examples may be compared with them. Raises `SupportSetNotFound`,
        `InvalidRequest` for an impossible selection, even if no prompt is written, and only then the engine's errors.
        """
        if (examples := fields.examples) is None:
            return None
        selects_by_media = examples.k != 0 and "media" in SPACES.get(examples.strategy, ())
        if not query or not (selects_by_media or fields.compares_media):
            return await self._find(examples)
        embedding = asyncio.create_task(self.retrieval.embed_query(query))
        try:
            support_set = await self._find(examples)
            await embedding
        finally:
            await cancel((embedding,))
        return support_set

    async def _find(self, examples: ExamplesFields) -> SupportSet:
        try:
            version = await self.support_sets.get_version(examples.support_set, examples.version)
        except SupportSetNotFound as error:
            error.param = f"examples.{error.param or 'support_set'}"
            raise
        check_selection(examples.strategy, len(version.examples), examples.k or 0, examples.order)
        return version

    async def search(self, support_set: SupportSet, fields: ExamplesFields, query: SimilarityQuery) -> Search | None:
        """Return the search of a strategy that compares examples with the query; None for another one, or without shots.

        Raises what `Retrieval.search` raises.
        """
        if fields.strategy not in SPACES or fields.k == 0 or not support_set.examples:
            return None
        return await self.retrieval.search(support_set, fields.strategy, query)

    def select(
        self,
        support_set: SupportSet,
        fields: ExamplesFields,
        template: Template,
        search: Search | None = None,
        *,
        is_text_only: bool = False,
        without: Collection[str] = (),
    ) -> tuple[list[Shot], dict[bytes, EncodedMedia]]:
        """Return the selected examples as shots, and their media by digest. It takes milliseconds for a large set.

        `search`: the result of the method `search` for the same fields. `without`: ids of examples that may not become
        shots. Raises `InvalidRequest` for a selection that the set or the template does not allow.
        """
        examples, without = support_set.examples, frozenset(without)
        excluded = {index for index, example in enumerate(examples) if example.id in without} if without else set()
        default = min(DEFAULT_K_TEXT_ONLY if is_text_only else DEFAULT_K, len(examples) - len(excluded))
        k = default if fields.k is None else fields.k
        selected = select_examples(
            fields.strategy,
            examples,
            k,
            seed=fields.seed,
            order=fields.order,
            similar=search(k + len(excluded)) if search else (),
            without=excluded,
        )
        media_ids = [] if is_text_only else _media_of(selected, template)
        return _as_shots(selected, self.intake.refer_all(media_ids, SUPPORT_SET))

    def read_examples(
        self, examples: Sequence[Example], template: Template
    ) -> tuple[list[Shot], dict[bytes, EncodedMedia]]:
        """Return examples as shots, with their media by digest. Raises `InvalidRequest`.

        Each has at most one media item. Their number may exceed the limit of a request.
        """
        selected = [Selected(example) for example in examples]
        media_ids = _media_of(selected, template)
        return _as_shots(selected, [self.intake.store.refer(media_id, SUPPORT_SET) for media_id in media_ids])


def check_media(has_media: bool, param: str, template: Template, owner: str, *, remedy: str = "") -> None:
    """Check that `owner` has media exactly if the template has them: text without its own media would read another's.

    `remedy`: advice for the message if media are missing, besides another template. Raises `InvalidRequest`.
    """
    if template.has_media == has_media:
        return
    if has_media:
        fault = f"the template {template.name!r} has no {{media}}, but {owner} has media"
        advice = "choose a template with {media}, such as 'caption'"
    else:
        fault = f"{owner} has no image or video, which the template {template.name!r} shows as {{media}}"
        advice = f"{remedy}choose a template without {{media}}, such as {TEXT_ONLY}"
    raise InvalidRequest(f"{fault}: {advice}", param=param)


def select_examples(
    strategy: Strategy,
    examples: Examples[Example],
    k: int,
    *,
    seed: int = 0,
    order: Order | None = None,
    similar: Sequence[Similar] = (),
    without: Collection[int] = (),
) -> list[Selected]:
    """Return `k` examples in prompt order. `similar`: for strategies that compare, the most similar, best first.

    `without`: indices of examples that must not be selected. The next examples of the draw replace them, so that leaving
    one out does not change the others. Raises `InvalidRequest`.
    """
    check_selection(strategy, len(examples) - len(without), k, order)
    scores = {item.index: item.score for item in similar[: k + len(without)]} if strategy in SPACES else {}
    picked = scores if strategy in SPACES else _picked(strategy, examples, k, random.Random(seed), without)
    kept = list(islice((index for index in picked if index not in without), k))
    ordered = _ordered(kept, order or DEFAULT_ORDER[strategy], seed)
    return [Selected(examples[index], scores.get(index)) for index in ordered]


def check_selection(
    strategy: Strategy, num_examples: int, k: int, order: Order | None, *, within: str = "examples."
) -> None:
    """Check that a selection is possible. Raises `InvalidRequest`.

    `within` begins the paths of its fields in the request.
    """
    if k > num_examples:
        raise InvalidRequest(f"k is {k}, only {num_examples} examples can be selected", param=f"{within}k")
    if order == "similar_last" and strategy not in SPACES:
        raise InvalidRequest(
            f"similar_last needs a strategy that compares examples, but {strategy} does not", param=f"{within}order"
        )


def _ordered(indices: list[int], order: Order, seed: int) -> list[int]:
    match order:
        case "as_selected":
            return indices
        case "similar_last":
            return indices[::-1]
        case "stored":
            return sorted(indices)
        case "shuffled":
            # independent of the random numbers of the selection
            return random.Random(f"order {seed}").sample(indices, len(indices))


def _picked(
    strategy: Strategy, examples: Examples[Example], k: int, rng: random.Random, without: Collection[int]
) -> Iterable[int]:
    """Return the indices in the order of the draw, at least `k` besides those of `without`."""
    if strategy == "balanced":
        return _balanced(examples, k, rng, without)
    # a larger `k` begins with the draw of a smaller one
    return _shuffled(len(examples), rng) if strategy == "random" else range(len(examples))


def _shuffled(size: int, rng: random.Random) -> Iterator[int]:
    """Yield the indices in random order: those of `rng.sample(range(size), size)`, each only when it is needed."""
    moved: dict[int, int] = {}
    for num_left in range(size, 0, -1):
        position = rng.randrange(num_left)
        yield moved.get(position, position)
        moved[position] = moved.get(num_left - 1, num_left - 1)


def _balanced(examples: Examples[Example], k: int, rng: random.Random, without: Collection[int]) -> list[int]:
    """Draw in rounds of one example per label, so that the counts of labels differ by at most one.

    An example in `without` is replaced by another one of its label, which would otherwise be missing in that round.
    """
    if examples and not examples.are_labelled:
        bare = next(example for example in examples if not example.label)
        message = f"balanced needs a label for each example, but {bare.id!r} has none"
        raise InvalidRequest(message, param="examples.strategy")
    by_label = {label: [*indices] for label, indices in examples.by_answer.items()}
    for indices in by_label.values():
        rng.shuffle(indices)
    for index in sorted(without):
        indices = by_label[examples[index].label]
        indices[indices.index(index)] = indices[0]  # the last one to be drawn
        del indices[0]
    picked: list[int] = []
    while len(picked) < k:
        labels = [label for label, indices in by_label.items() if indices]
        rng.shuffle(labels)
        picked += [by_label[label].pop() for label in labels[: k - len(picked)]]
    return picked


def _media_of(selected: Sequence[Selected], template: Template) -> list[str]:
    """Return the ids of all media of examples. Raises `InvalidRequest` for an example that does not fit the template."""
    for item in selected:
        check_media(bool(item.example.media), SUPPORT_SET, template, f"the example {item.example.id!r}")
    return list(dict.fromkeys(media_id for item in selected for media_id in item.example.media))


def _as_shots(
    selected: Sequence[Selected], media: Sequence[EncodedMedia]
) -> tuple[list[Shot], dict[bytes, EncodedMedia]]:
    """Return examples as shots with these media, which may lack all of theirs, and the media by digest."""
    digests = {item.id: item.digest for item in media}
    shots = [
        Shot(
            media=tuple(digests[media_id] for media_id in item.example.media if media_id in digests),
            text=item.example.text,
            question=item.example.question,
            label=item.example.label,
            id=item.example.id,
            score=item.score,
            param=SUPPORT_SET,
        )
        for item in selected
    ]
    return shots, {item.digest: item for item in media}
