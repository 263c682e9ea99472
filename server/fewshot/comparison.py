"""Compares the query of a few-shot request with all of its examples: the shots given, or the whole version of a set.

`auto` chooses the method: by leave-one-out among those by likeness, or the blend with the language model where a label has
a single example. What is fitted to a version, or to the same shots, is kept for later requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from server.errors import InvalidRequest
from server.fewshot.candidates import Candidate, answer_of
from server.fewshot.classification import IN_CONTEXT
from server.fewshot.methods import CLASSES, likeness_method, likeness_methods
from server.fewshot.methods.likeness import Array, Fitted, Labelled, best_method
from server.fewshot.prompting import Question
from server.fewshot.recent import Recent
from server.fewshot.retrieval import Retrieval, Vectors

LINEAR = "linear"
# examples up to which a linear head is fitted, and those up to which `auto` fits one for each that is left out
MAX_LINEAR, MAX_COMPARED_LINEAR = 4096, 512
# the likeness that is blended with the language model
BLENDED = "nearest_mean"

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Chosen:
    """A method, and its part by likeness with that part's name: None for the language model alone."""

    method: str
    likeness: str | None = None
    fitted: Fitted | None = None

    @property
    def reads_prompt(self) -> bool:
        """True if the language model takes part."""
        return self.method in (IN_CONTEXT, "blend")


@dataclass(slots=True, eq=False)
class ComparedExamples:
    """The labelled vectors of one version, or of one list of shots, and the methods that were fitted to them."""

    labelled: Labelled
    fitted: dict[str, Fitted] = field(default_factory=dict)
    best: str = ""

    @property
    def num_bytes(self) -> int:
        return 2 * self.labelled.vectors.nbytes

    def fit(self, name: str) -> Fitted:
        if name not in self.fitted:
            self.fitted[name] = likeness_method(name).fit(self.labelled)
        return self.fitted[name]

    def choose(self) -> str:
        """Return the best method by leave-one-out, or the blend where it cannot tell: a label has a single example."""
        if not self.best:
            is_large = len(self.labelled.vectors) > MAX_COMPARED_LINEAR
            names = [name for name in CLASSES if not (is_large and name == LINEAR)]
            is_blend = self.labelled.counts().min() < 2
            self.best = "blend" if is_blend else best_method(likeness_methods(names), self.labelled)
        return self.best


@dataclass(frozen=True, slots=True)
class Comparison:
    """Chooses a method for a request, and fits its part by likeness."""

    retrieval: Retrieval
    recent: Recent[ComparedExamples] = field(default_factory=Recent)
    thread: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="likeness"), repr=False)

    async def choose(self, question: Question, method: str, candidates: Sequence[Candidate]) -> Chosen:
        """Return the method of a request. Raises `InvalidRequest` for one that cannot be used with these examples."""
        if method == IN_CONTEXT:
            return Chosen(method)
        if obstacle := _obstacle(question, candidates):
            if method == "auto":
                return Chosen(IN_CONTEXT)
            raise InvalidRequest(f"{method} {obstacle}; in_context can", param="method")
        if method == LINEAR and (number := len(question.examples)) > MAX_LINEAR:
            raise InvalidRequest(f"linear takes up to {MAX_LINEAR} examples, there are {number}", param="method")
        examples = await self._examples(question, candidates)
        if method == "auto":
            method = await self._run(examples.choose)
        likeness = BLENDED if method == "blend" else method
        return Chosen(method, likeness, await self._run(examples.fit, likeness))

    async def _run(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Run a function that fits methods in a thread of its own, so that it takes none from other work."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *arguments)

    async def compare(self, question: Question, chosen: Chosen) -> dict[str, Array]:
        """Return the log-probabilities [C] of the candidates by the name of the part by likeness, if there is one."""
        if chosen.likeness is None or chosen.fitted is None:
            return {}
        media = [question.media[digest] for digest in question.query.media]
        (vector,) = await self.retrieval.media_vectors([media])
        return {chosen.likeness: chosen.fitted.log_probabilities(vector[None])[0]}

    async def _examples(self, question: Question, candidates: Sequence[Candidate]) -> ComparedExamples:
        labels = {name: index for index, c in enumerate(candidates) for name in (c.text, c.label)}
        examples, stored = question.examples, question.support_set
        used = [index for index, example in enumerate(examples) if answer_of(example) in labels]

        async def build() -> ComparedExamples:
            vectors = await self._vectors(question)
            indices = np.array([labels[answer_of(examples[index])] for index in used])
            return ComparedExamples(Labelled(vectors[used], indices, len(candidates)))

        source: Hashable = (stored.id, stored.version) if stored else tuple(s.media for s in question.shots)
        answers = tuple(answer_of(examples[index]) for index in used)
        names = tuple((candidate.label, candidate.text) for candidate in candidates)
        return await self.recent.get((source, answers, names, self.retrieval.embedder), build)

    async def _vectors(self, question: Question) -> Vectors:
        if question.support_set is not None:
            return await self.retrieval.example_vectors(question.support_set)
        return await self.retrieval.media_vectors(
            [[question.media[digest] for digest in shot.media] for shot in question.shots]
        )


def _obstacle(question: Question, candidates: Sequence[Candidate]) -> str:
    """Return why methods by likeness cannot answer the question, or nothing if they can."""
    if question.fields.zero_shot:
        return "compares media, and zero_shot shows examples without them"
    if not question.query.media:
        return "compares media, and the query has none"
    examples = question.examples
    if any(not example.media for example in examples):
        return "compares media, and an example has none"
    answers = {answer_of(example) for example in examples}
    for candidate in candidates:
        if answers.isdisjoint((candidate.label, candidate.text)):
            return f"needs an example of each candidate, and {candidate.label[:80]!r} has none"
    return ""
