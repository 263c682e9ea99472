"""Diagnoses versions of support sets, and suggests what to label next.

The computations run in a thread of their own, in pieces at which clients take turns, and what was computed for a version is
kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from model.likeness import Vectors
from server.errors import InvalidRequest
from server.fewshot.comparison import ComparedExamples
from server.fewshot.confidence import probabilities
from server.fewshot.recent import Recent
from server.fewshot.retrieval import Retrieval
from server.limits.turns import ThreadTurns
from server.media.source import EncodedMedia
from server.quality.diagnostics import Diagnosing, Diagnosis, read_labelled
from server.quality.suggestion import Suggestion, suggest
from server.store.records import SupportSet

# examples whose similarities to each other are computed: up to 25 s of one processor core
MAX_EXAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Suggestions:
    """Images of a pool in the order in which to label them; without two labels, no method weighs these."""

    method: str | None
    entries: list[Suggestion]


@dataclass(frozen=True, slots=True)
class Curation:
    """Compares the examples of a version with each other, and with images that have no label yet.

    `compared` may be shared with classifications, and its limit with it.
    """

    retrieval: Retrieval
    compared: Recent[ComparedExamples] = field(default_factory=Recent)
    diagnoses: Recent[Diagnosis] = field(default_factory=Recent)
    _run: ThreadTurns = field(default_factory=partial(ThreadTurns, 1, "curation"), repr=False)

    async def diagnose(self, support_set: SupportSet) -> Diagnosis:
        """Diagnose a version that `check_diagnosable` accepts. Raises the engine's errors."""
        labelled = read_labelled(support_set.examples)

        async def build() -> Diagnosis:
            vectors = await self.retrieval.example_vectors(labelled.examples)
            diagnosing = await self._run(Diagnosing, labelled, vectors)
            await self._run.each(diagnosing.compare, diagnosing.pieces)
            return await self._run(diagnosing.diagnosis)

        return await self.diagnoses.get(self._key(support_set), build)

    async def suggest(self, support_set: SupportSet, pool: Sequence[Sequence[EncodedMedia]], count: int) -> Suggestions:
        """Return up to `count` images of a pool without repetitions. Raises the engine's errors."""
        labelled = read_labelled(support_set.examples)
        vectors = await self._pool_vectors(pool)
        if not len(vectors):
            return Suggestions(None, [])
        if not labelled.examples:
            return Suggestions(None, await self._run(suggest, vectors, vectors[:0], None, (), count))

        async def build() -> ComparedExamples:
            known = labelled.labelled(await self.retrieval.example_vectors(labelled.examples))
            return ComparedExamples(known, self.retrieval.model.prior)

        examples = await self.compared.get(self._key(support_set), build)
        return await self._run(_suggest, examples, labelled.names, vectors, count)

    async def _pool_vectors(self, pool: Sequence[Sequence[EncodedMedia]]) -> Vectors:
        """Return a vector per image. Those of stored media are kept, since the next request has the same pool."""
        stored = dict.fromkeys(item.id for media in pool for item in media if item.is_stored)
        await self.retrieval.embed_media(list(stored))
        return await self.retrieval.media_vectors(pool) if pool else np.zeros((0, 0), np.float32)

    def _key(self, support_set: SupportSet) -> tuple[str, ...]:
        return "labelled media", support_set.id, str(support_set.version), self.retrieval.embedder


def check_diagnosable(support_set: SupportSet) -> None:
    """Check that a version has labelled media, and no more examples than can be compared. Raises `InvalidRequest`."""
    if not read_labelled(support_set.examples).examples:
        raise InvalidRequest("diagnostics compare labelled media, and no example has media and a label or a text")
    check_number(support_set)


def check_number(support_set: SupportSet) -> None:
    """Check that a version has at most `MAX_EXAMPLES` examples. Raises `InvalidRequest`."""
    if (number := len(support_set.examples)) > MAX_EXAMPLES:
        raise InvalidRequest(f"up to {MAX_EXAMPLES} examples are compared with each other, there are {number}")


def _suggest(examples: ComparedExamples, names: Sequence[str], vectors: Vectors, count: int) -> Suggestions:
    labelled = examples.labelled.vectors
    if len(names) < 2:
        return Suggestions(None, suggest(vectors, labelled, None, names, count))
    method = examples.choose_method()
    logs = examples.fit(method).log_probabilities(vectors)
    certainty = probabilities(logs, examples.confidence(method).temperature)
    return Suggestions(method, suggest(vectors, labelled, certainty, names, count))
