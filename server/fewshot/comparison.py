"""Compares the query of a few-shot request with all of its examples: the shots in the request, or a version of a set.

`auto` means the method that the latest evaluation of the set recommends. Without an evaluation, it means the method by
likeness that the model's own evaluation found best, unless another one is clearly better in leave-one-out. A fitted method,
and the confidence in its answers by the same leave-one-out, are cached for later requests with the same version or shots.
If it was fitted to a version with all labels, it is also stored in the database.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np

from model.likeness import Likeness, Vectors
from model.prior import NEAREST_MEAN, Prior
from server.errors import DatabaseUnavailable, InvalidRequest, UnsupportedParameter
from server.fewshot.candidates import Candidate, candidates_of
from server.fewshot.confidence import DEFAULT_TEMPERATURES, Confidence, fit_confidence
from server.fewshot.fits import Fit, FitStore, FittedVersion, LeftOut
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
from server.fewshot.retrieval import Retrieval
from server.fewshot.shots import place_of
from server.fewshot.templates import Shot
from server.limits.turns import ThreadTurns
from server.schemas.fewshot import ConfidenceFields
from server.store.examples import Answered, Examples, answer_of
from server.store.records import Example, SupportSet

NO_CANDIDATE = -1
NO_FIT = Fit()
# labels that a message lists
MAX_SHOWN = 8
# methods whose parameters are a vector of doubles per label: the means, and the weights of the linear head
NUM_PER_LABEL = 2
# of an example in the confidence of all methods and in the key of the cache, and of all else that is not vectors
EXAMPLE_BYTES = 512
OVERHEAD_BYTES = 32 * 1024
# examples to which all methods are fitted, and left out of, in a fraction of a second
MANY = 256

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class Obstacle(NamedTuple):
    """Why methods by likeness cannot answer a question, and the path of the field at fault."""

    fault: str
    param: str = "method"


@dataclass(frozen=True, slots=True)
class ChosenMethod:
    """A method, the confidence in its answers, and the fit of its part by likeness, if it has one."""

    method: str
    confidence: Confidence
    fitted: Fitted | None = None

    @property
    def reads_prompt(self) -> bool:
        """True if the language model takes part."""
        return self.method not in METHODS

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
            message = f"{name} needs the fitted temperature, {self.confidence.temperature}: do not set temperature"
            raise UnsupportedParameter(message, param="temperature")
        return self.confidence.threshold(name, target)

    def _lack(self) -> str:
        """Return, for a message, what the method would need for a threshold."""
        if self.reads_prompt:
            return (
                f"needs an evaluation for the method {self.method} of a set with two examples of each label, with the "
                "default template and scoring fields: evaluate the support set, and send what its latest evaluation "
                "recommends, or use a method by likeness"
            )
        limit = METHODS[self.method].max_left_out
        most = f", and {self.method} leaves out one of up to {limit}" if math.isfinite(limit) else ""
        return f"needs two examples of each candidate, so that one can be left out{most}"


@dataclass(slots=True, eq=False)
class ComparedExamples:
    """The labelled vectors of one version, or of one list of shots, and the fits to them by method.

    `version` identifies the stored `fits`; `unsaved` has the names of fits that are not stored yet. Only one thread at a
    time may use it.
    """

    labelled: Labelled
    prior: Prior = NEAREST_MEAN
    version: FittedVersion | None = None
    fits: dict[str, Fit] = field(default_factory=dict)
    unsaved: set[str] = field(default_factory=set)
    fitted: dict[str, Fitted] = field(default_factory=dict)
    best: str = ""

    @property
    def num_bytes(self) -> int:
        """The bytes of the vectors, and of the fits of all methods."""
        vectors = self.labelled.vectors
        parameters = NUM_PER_LABEL * self.labelled.num_labels * vectors.shape[1] * np.dtype(np.float64).itemsize
        return vectors.nbytes + parameters + len(vectors) * EXAMPLE_BYTES + OVERHEAD_BYTES

    def fit(self, name: str) -> Fitted:
        if name not in self.fitted:
            method, parameters = load_method(name), self._fit_of(name).parameters
            if parameters is None:
                self.fitted[name] = method.fit(self.labelled)
                self._add(name, replace(self._fit_of(name), parameters=self.fitted[name].parameters()))
            else:
                self.fitted[name] = method.restore(parameters, self.labelled)
        return self.fitted[name]

    def choose_method(self) -> str:
        """Return the method that the model's prior expects to be best, or one that is clearly better in leave-one-out.

        Leave-one-out is impossible if a label has a single example.
        """
        if not self.best:
            number = len(self.labelled.vectors)
            allowed = [name for name, entry in METHODS.items() if number <= entry.max_left_out]
            expected = self.prior.method(number / self.labelled.num_labels, allowed)
            compared = {name: self._leave_out(name).is_correct for name in allowed if self.can_leave_out(name)}
            self.best = best_method(compared, expected) if compared else expected
        return self.best

    def confidence(self, method: str) -> Confidence:
        """Return the confidence of a method; the default one if no example can be left out."""
        if self.can_leave_out(method):
            return self._leave_out(method).confidence
        return Confidence(DEFAULT_TEMPERATURES[method])

    def can_leave_out(self, method: str) -> bool:
        """Return whether leave-one-out with a method by likeness is possible, and fast enough for a waiting request."""
        is_small = method in METHODS and len(self.labelled.vectors) <= METHODS[method].max_left_out
        return is_small and self.labelled.counts().min() >= 2

    def unsaved_fits(self) -> dict[str, Fit]:
        """Return the fits that are not stored yet."""
        return {name: self.fits[name] for name in self.unsaved}

    def _leave_out(self, name: str) -> LeftOut:
        """Return the answers of a method to examples that are left out."""
        if (left_out := self._fit_of(name).left_out) is None:
            labels = self.labelled.labels
            logs = left_out_log_probabilities(load_method(name), self.labelled, CHOICE_FOLDS)
            left_out = LeftOut(logs.argmax(1) == labels, fit_confidence(name, logs, labels))
            self._add(name, replace(self._fit_of(name), left_out=left_out))
        return left_out

    def _fit_of(self, name: str) -> Fit:
        return self.fits.get(name, NO_FIT)

    def _add(self, name: str, fit: Fit) -> None:
        self.fits[name] = fit
        self.unsaved.add(name)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Chooses a method for a request, and fits its part by likeness."""

    retrieval: Retrieval
    fits: FitStore
    recent: Recent[ComparedExamples] = field(default_factory=Recent)
    # Run functions that fit methods, so that they do not occupy threads of other work. Those of many examples may take
    # seconds, for which requests with few do not wait.
    _few: ThreadTurns = field(default_factory=partial(ThreadTurns, 1, "likeness"), repr=False)
    _many: ThreadTurns = field(default_factory=partial(ThreadTurns, 1, "likeness of many"), repr=False)

    async def choose(
        self, question: Question, method: str, candidates: Sequence[Candidate], recommended: str | None = None
    ) -> ChosenMethod:
        """Return the method of a request; `recommended`, for `auto`, comes from an evaluation of its support set.

        Raises `InvalidRequest` for a method that cannot be used with these examples.
        """
        if IN_CONTEXT in (method, recommended) or ((obstacle := _obstacle(question, candidates)) and method == "auto"):
            return ChosenMethod(IN_CONTEXT, Confidence(DEFAULT_TEMPERATURES[IN_CONTEXT]))
        if obstacle:
            raise InvalidRequest(f"{method} {obstacle.fault}", param=obstacle.param)
        _check_answers(question)
        number = len(question.examples)
        if method in METHODS and number > (limit := METHODS[method].max_examples):
            raise InvalidRequest(f"{method} supports up to {limit} examples, but there are {number}", param="method")
        examples = await self._examples(question, candidates)
        run = self._turns_of(examples)
        if method == "auto":
            method = await run(examples.choose_method) if recommended is None else recommended
        confidence = await run(examples.confidence, method)
        fitted = await run(examples.fit, _part_by_likeness(method))
        await self._save(examples)
        return ChosenMethod(method, confidence, fitted)

    async def fit_version(self, support_set: SupportSet) -> None:
        """Choose and fit the method of later requests for a version whose examples have labels, if it is by likeness."""
        examples = support_set.examples
        if not examples.are_labelled:
            return
        try:
            candidates = candidates_of(examples)
        except InvalidRequest:  # too many labels: a request has to list its candidates
            return
        if not obstacle_of(examples, candidates):
            compared = await self._of_version(support_set, candidates)
            run = self._turns_of(compared)
            await run(compared.fit, _part_by_likeness(await run(compared.choose_method)))
            await self._save(compared)

    def _turns_of(self, examples: ComparedExamples) -> ThreadTurns:
        """Return the turns in which these examples are read and changed."""
        return self._many if len(examples.labelled.vectors) > MANY else self._few

    async def _save(self, examples: ComparedExamples) -> None:
        """Store the fits to a version. A request does not fail if they cannot be stored."""
        if examples.version is None or not examples.unsaved:
            return
        run = self._turns_of(examples)
        try:
            if fits := await run(examples.unsaved_fits):
                await self.fits.put(examples.version, fits)
                await run(examples.unsaved.difference_update, fits)
        except DatabaseUnavailable as error:  # the next request tries again
            logger.warning("a fitted classifier of a support set could not be stored", extra={"error": error.message})

    async def compare(self, question: Question, chosen: ChosenMethod) -> dict[str, Array]:
        """Return the log-probabilities [C] of the candidates by the name of the part by likeness, if there is one."""
        if chosen.fitted is None:
            return {}
        media = [question.media[digest] for digest in question.query.media]
        vector = await self.retrieval.query_vector(media)
        # many examples of many labels take tens of milliseconds
        logs = await asyncio.to_thread(chosen.fitted.log_probabilities, vector[None])
        return {_part_by_likeness(chosen.method): logs[0]}

    async def leave_out(
        self,
        support_set: SupportSet,
        candidates: Sequence[Candidate],
        parts: Collection[str],
        measure: Callable[[LikenessMethod, Labelled], Result],
        likeness: Likeness | None = None,
    ) -> dict[str, Result]:
        """Return a measurement of each part that leaves out each example in turn, by a likeness or else the model's.

        Each candidate is the answer of an example, one of them of at least two, and each answer is a candidate.
        """
        if not parts:
            return {}
        vectors = await self.retrieval.example_vectors(support_set.examples, likeness)
        labelled = await asyncio.to_thread(_labelled, vectors, support_set.examples, candidates)

        def load_and_measure(part: str) -> Result:
            return measure(load_method(part), labelled)  # loading takes a second on first use

        return {part: await asyncio.to_thread(load_and_measure, part) for part in parts}

    async def _examples(self, question: Question, candidates: Sequence[Candidate]) -> ComparedExamples:
        if question.support_set is not None:
            return await self._of_version(question.support_set, candidates)
        shots = question.shots

        async def build() -> ComparedExamples:
            media = [[question.media[digest] for digest in shot.media] for shot in shots]
            labelled = _labelled(await self.retrieval.media_vectors(media), shots, candidates)
            return ComparedExamples(labelled, self.retrieval.model.prior)

        # without the texts of shots and candidates, which may be long
        source = tuple(zip([shot.media for shot in shots], _indices(shots, candidates), strict=True))
        key = (self.retrieval.engine.salt, source, len(candidates), self.retrieval.embedder)
        return await self.recent.get(key, build)

    async def _of_version(self, support_set: SupportSet, candidates: Sequence[Candidate]) -> ComparedExamples:
        version = FittedVersion(support_set.id, support_set.version, self.retrieval.embedder)
        # of the distinct answers, of which there may be far fewer than examples
        by_answer = _candidate_by_answer(candidates)
        answered = tuple(by_answer.get(answer, NO_CANDIDATE) for answer in filter(None, support_set.examples.by_answer))

        async def build() -> ComparedExamples:
            vectors = await self.retrieval.example_vectors(support_set.examples)
            labelled = await asyncio.to_thread(_labelled, vectors, support_set.examples, candidates)
            # only a fit to all answers, in their order, is stored
            if answered != tuple(range(len(candidates))):
                return ComparedExamples(labelled, self.retrieval.model.prior)
            return ComparedExamples(labelled, self.retrieval.model.prior, version, await self.fits.get(version))

        return await self.recent.get((version, answered), build)


def _part_by_likeness(method: str) -> str:
    (likeness,) = (part for part in parts_of(method) if part != IN_CONTEXT)
    return likeness


def _labelled(vectors: Vectors, examples: Sequence[Answered], candidates: Sequence[Candidate]) -> Labelled:
    """Return the vectors of the examples whose answer is a candidate."""
    indices = np.array(_indices(examples, candidates), np.int64)
    is_used = indices != NO_CANDIDATE
    return Labelled(vectors[is_used], indices[is_used], len(candidates))


def _indices(examples: Sequence[Answered], candidates: Sequence[Candidate]) -> list[int]:
    """Return the index of the candidate that is each example's answer, [N]."""
    by_answer = _candidate_by_answer(candidates)
    return [by_answer.get(answer_of(example), NO_CANDIDATE) for example in examples]


def _candidate_by_answer(candidates: Sequence[Candidate]) -> dict[str, int]:
    """Return the index of the candidate with an answer: by its label or, if no label is equal, by its text."""
    by_text = {candidate.text: index for index, candidate in enumerate(candidates)}
    return by_text | {candidate.label: index for index, candidate in enumerate(candidates)}


def _obstacle(question: Question, candidates: Sequence[Candidate]) -> Obstacle | None:
    """Return why methods by likeness cannot answer the question, None if they can."""
    if not question.query.media:
        return Obstacle("compares media, but the query has none", question.query.param)
    if question.fields.zero_shot:
        return Obstacle("compares media, but zero_shot shows examples without media")
    return obstacle_of(question.examples, candidates)


def obstacle_of(examples: Examples[Shot | Example], candidates: Sequence[Candidate]) -> Obstacle | None:
    """Return what these examples lack for methods by likeness, None if nothing."""
    if (bare := examples.first_without_media) is not None:
        _, name = place_of(bare)
        return Obstacle(f"compares media, but {name} has none: the method in_context supports examples without media")
    answered = {index for answer, index in _candidate_by_answer(candidates).items() if answer in examples.by_answer}
    for index, candidate in enumerate(candidates):
        if index not in answered:
            fault = f"needs an example of each candidate, but {candidate.label[:80]!r} has none"
            return Obstacle(f"{fault}: the examples have {_some_answers(examples)}", candidate.param)
    return None


def _some_answers(examples: Examples[Shot | Example]) -> str:
    """Return the first answers of examples, shortened, for a message."""
    answers = [*filter(None, examples.by_answer)]
    listed = [repr(answer[:40]) for answer in answers[:MAX_SHOWN]]
    if len(answers) > MAX_SHOWN:
        listed.append("...")
    return ", ".join(listed) or "no label"


def _check_answers(question: Question) -> None:
    """Check that each example has an answer: others would be ignored silently. Raises `InvalidRequest`."""
    examples = question.examples
    if bare := examples.by_answer.get(""):
        path, name = place_of(examples[bare[0]])
        raise InvalidRequest(f"{name} has neither a label nor a text, so it has no answer", param=path)
