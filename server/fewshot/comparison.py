"""Compares the query of a few-shot request with all of its examples: the shots given, or the whole version of a set.

`auto` takes the method that the latest evaluation of the set recommends or, without one, the method by likeness that the
model's own evaluation found best, unless another one is clearly better in leave-one-out. What is fitted to a version, or to
the same shots, is kept for later requests: a method, and the confidence in its answers by the same leave-one-out.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Hashable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from model.prior import NEAREST_MEAN, Prior
from server.errors import InvalidRequest, UnsupportedParameter
from server.fewshot.candidates import Answered, Candidate, answer_of, candidates_of
from server.fewshot.confidence import Confidence, default_confidence, fit_confidence
from server.fewshot.methods import IN_CONTEXT, METHODS, load_method, parts_of
from server.fewshot.methods.likeness import (
    CHOICE_FOLDS,
    Array,
    Fitted,
    Labelled,
    LikenessMethod,
    best_method,
    left_out_log_probabilities,
)
from server.fewshot.prompting import Question
from server.fewshot.recent import Recent
from server.fewshot.retrieval import Retrieval, Vectors
from server.fewshot.shots import SUPPORT_SET
from server.fewshot.templates import Shot
from server.schemas.fewshot import ConfidenceFields
from server.store.records import Example, SupportSet

NO_CANDIDATE = -1

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Chosen:
    """A method, the confidence in its answers, and its part by likeness with that part's name, if it has one."""

    method: str
    confidence: Confidence
    likeness: str | None = None
    fitted: Fitted | None = None

    @property
    def reads_prompt(self) -> bool:
        """True if the language model takes part."""
        return IN_CONTEXT in parts_of(self.method)

    def temperature(self, fields: ConfidenceFields) -> float:
        return self.confidence.temperature if fields.temperature is None else fields.temperature

    def threshold(self, fields: ConfidenceFields) -> float | None:
        """Return the threshold that a request's target needs; None without one. Raises `UnsupportedParameter`."""
        if fields.target is None:
            return None
        name, target = fields.target
        if not self.confidence.curve:
            raise UnsupportedParameter(f"{name} {self._lack()}", param=name)
        if fields.temperature not in (None, self.confidence.temperature):
            message = f"{name} needs the fitted temperature, {self.confidence.temperature}: leave temperature out"
            raise UnsupportedParameter(message, param="temperature")
        return self.confidence.threshold(name, target)

    def _lack(self) -> str:
        """Return what the method would need for a threshold."""
        if self.reads_prompt:
            return (
                f"needs an evaluation for the method {self.method}: evaluate the support set, and send the examples, the "
                "method and the temperature that it recommends, or use a method by likeness"
            )
        limit = METHODS[self.method].max_left_out
        most = f", and {self.method} leaves out one of up to {limit}" if math.isfinite(limit) else ""
        return f"needs two examples of each candidate, so that one can be left out{most}"


@dataclass(slots=True, eq=False)
class ComparedExamples:
    """The labelled vectors of one version, or of one list of shots, and what was fitted to them, by method."""

    labelled: Labelled
    prior: Prior = NEAREST_MEAN
    fitted: dict[str, Fitted] = field(default_factory=dict)
    is_correct: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    confidences: dict[str, Confidence] = field(default_factory=dict)
    best: str = ""

    @property
    def num_bytes(self) -> int:
        return 2 * self.labelled.vectors.nbytes

    def fit(self, name: str) -> Fitted:
        if name not in self.fitted:
            self.fitted[name] = load_method(name).fit(self.labelled)
        return self.fitted[name]

    def choose(self) -> str:
        """Return the method that the model's prior expects to be best, or one that is clearly better in leave-one-out.

        Leave-one-out cannot tell if a label has a single example.
        """
        if not self.best:
            number = len(self.labelled.vectors)
            allowed = [name for name, entry in METHODS.items() if number <= entry.max_left_out]
            expected = self.prior.method(number / self.labelled.num_labels, allowed)
            compared = {name: self._leave_out(name) for name in allowed if self.can_leave_out(name)}
            self.best = best_method(compared, expected) if compared else expected
        return self.best

    def confidence(self, method: str) -> Confidence:
        """Return the confidence of a method: the default one where no example can be left out."""
        if not self.can_leave_out(method):
            return default_confidence(method)
        self._leave_out(method)
        return self.confidences[method]

    def can_leave_out(self, method: str) -> bool:
        """Return whether a method by likeness can be judged by the examples themselves, in a time that a request waits."""
        is_small = method in METHODS and len(self.labelled.vectors) <= METHODS[method].max_left_out
        return is_small and self.labelled.counts().min() >= 2

    def _leave_out(self, method: str) -> NDArray[np.bool_]:
        """Return which examples a method answers correctly when they are left out: [N]."""
        if method not in self.is_correct:
            logs, labels = self._left_out_logs(method), self.labelled.labels
            self.is_correct[method] = logs.argmax(1) == labels
            self.confidences[method] = fit_confidence(method, logs, labels)
        return self.is_correct[method]

    def _left_out_logs(self, method: str) -> Array:
        return left_out_log_probabilities(load_method(method), self.labelled, CHOICE_FOLDS)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Chooses a method for a request, and fits its part by likeness."""

    retrieval: Retrieval
    recent: Recent[ComparedExamples] = field(default_factory=Recent)
    thread: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="likeness"), repr=False)

    async def choose(
        self, question: Question, method: str, candidates: Sequence[Candidate], recommended: str | None = None
    ) -> Chosen:
        """Return the method of a request; for `auto`, `recommended` is what an evaluation of its support set found best.

        Raises `InvalidRequest` for a method that cannot be used with these examples.
        """
        if IN_CONTEXT in (method, recommended):
            return Chosen(IN_CONTEXT, default_confidence(IN_CONTEXT))
        if obstacle := _obstacle(question, candidates):
            if method == "auto":
                return Chosen(IN_CONTEXT, default_confidence(IN_CONTEXT))
            param = "method" if question.query.media else "query"
            raise InvalidRequest(f"{method} {obstacle}", param=param)
        _check_answers(question)
        number = len(question.examples)
        if method in METHODS and number > (limit := METHODS[method].max_examples):
            raise InvalidRequest(f"{method} takes up to {limit} examples, there are {number}", param="method")
        examples = await self._examples(question, candidates)
        if method == "auto":
            method = await self._run(examples.choose) if recommended is None else recommended
        likeness = _part_by_likeness(method)
        confidence = await self._run(examples.confidence, method)
        return Chosen(method, confidence, likeness, await self._run(examples.fit, likeness))

    async def prepare(self, support_set: SupportSet) -> None:
        """Choose and fit the method of later requests for a version whose examples have labels, if it is by likeness."""
        examples = support_set.examples
        if not examples or not all(example.label for example in examples):
            return
        try:
            candidates = candidates_of(examples)
        except InvalidRequest:  # too many: a request names those that it asks about
            return
        if not _lack(examples, candidates):
            compared = await self._of_version(support_set, candidates)
            await self._run(compared.fit, _part_by_likeness(await self._run(compared.choose)))

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

    async def leave_out(
        self,
        support_set: SupportSet,
        candidates: Sequence[Candidate],
        parts: Collection[str],
        measure: Callable[[LikenessMethod, Labelled], Result],
    ) -> dict[str, Result]:
        """Return a measurement of each part that leaves out each example in turn.

        Each candidate is the answer of at least two examples, and each answer is a candidate.
        """
        if not parts:
            return {}
        labelled = _labelled(await self.retrieval.example_vectors(support_set), support_set.examples, candidates)
        return {part: await asyncio.to_thread(measure, load_method(part), labelled) for part in parts}

    async def _examples(self, question: Question, candidates: Sequence[Candidate]) -> ComparedExamples:
        if question.support_set is not None:
            return await self._of_version(question.support_set, candidates)

        async def vectors() -> Vectors:
            return await self.retrieval.media_vectors(
                [[question.media[digest] for digest in shot.media] for shot in question.shots]
            )

        source = tuple((shot.media, answer_of(shot)) for shot in question.shots)
        return await self._recent(source, question.shots, candidates, vectors)

    async def _of_version(self, support_set: SupportSet, candidates: Sequence[Candidate]) -> ComparedExamples:
        source = (support_set.id, support_set.version)
        vectors = partial(self.retrieval.example_vectors, support_set)
        return await self._recent(source, support_set.examples, candidates, vectors)

    async def _recent(
        self,
        source: Hashable,
        examples: Sequence[Answered],
        candidates: Sequence[Candidate],
        vectors: Callable[[], Awaitable[Vectors]],
    ) -> ComparedExamples:
        async def build() -> ComparedExamples:
            return ComparedExamples(_labelled(await vectors(), examples, candidates), self.retrieval.model.prior)

        return await self.recent.get((source, tuple(candidates), self.retrieval.embedder), build)


def _part_by_likeness(method: str) -> str:
    (likeness,) = (part for part in parts_of(method) if part != IN_CONTEXT)
    return likeness


def _labelled(vectors: Vectors, examples: Sequence[Answered], candidates: Sequence[Candidate]) -> Labelled:
    """Return the vectors of the examples whose answer is a candidate."""
    indices = _answered_candidates(examples, candidates)
    is_used = indices != NO_CANDIDATE
    return Labelled(vectors[is_used], indices[is_used], len(candidates))


def _answered_candidates(examples: Sequence[Answered], candidates: Sequence[Candidate]) -> NDArray[np.int64]:
    """Return the index of the candidate that each example is of: by its label, else by its text; or `NO_CANDIDATE`."""
    by_text = {candidate.text: index for index, candidate in enumerate(candidates)}
    by_answer = by_text | {candidate.label: index for index, candidate in enumerate(candidates)}
    return np.array([by_answer.get(answer_of(example), NO_CANDIDATE) for example in examples], np.int64)


def _obstacle(question: Question, candidates: Sequence[Candidate]) -> str:
    """Return why methods by likeness cannot answer the question, or nothing if they can."""
    if not question.query.media:
        return "compares media, and the query has none"
    if question.fields.zero_shot:
        return "compares media, and zero_shot shows examples without them"
    return _lack(question.examples, candidates)


def _lack(examples: Sequence[Shot | Example], candidates: Sequence[Candidate]) -> str:
    """Return what examples lack that methods by likeness compare, or nothing."""
    if (bare := next((example for example in examples if not example.media), None)) is not None:
        return f"compares media, and {_name(bare)} has none: the method in_context reads examples without media"
    answered = set(_answered_candidates(examples, candidates).tolist())
    for index, candidate in enumerate(candidates):
        if index not in answered:
            return f"needs an example of each candidate, and {candidate.label[:80]!r} has none"
    return ""


def _check_answers(question: Question) -> None:
    """Check that each example has an answer: without one it would be left out unnoticed. Raises `InvalidRequest`."""
    for example in question.examples:
        if not answer_of(example):
            message = f"{_name(example)} has neither a label nor a text, so it has no answer"
            raise InvalidRequest(message, param=example.param if isinstance(example, Shot) else SUPPORT_SET)


def _name(example: Shot | Example) -> str:
    return example.param if isinstance(example, Shot) else f"the example {example.id!r}"
