"""Answers the queries of an evaluation: an example of a support set, with shots from the other ones, like a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from model.likeness import unit
from server.engine_client.client import EngineClient
from server.fewshot.classification import prepare_scoring, score_in_context
from server.fewshot.comparison import Comparison
from server.fewshot.methods import IN_CONTEXT
from server.fewshot.methods.likeness import Array, left_out_log_probabilities
from server.fewshot.prompting import assemble, find_template, read_question
from server.fewshot.retrieval import SPACES, Space
from server.fewshot.shots import ShotSource
from server.quality.controls import COMPARED_METHOD, ENCODER_FEATURES, with_shuffled_labels, without_media
from server.quality.evaluation import EvaluationPlan, Outcome, PromptSetting, left_out_together
from server.quality.evaluation_records import Evaluation
from server.quality.learning_curve import MAX_EXAMPLES, Curve, learning_curve
from server.schemas.fewshot import ExamplesFields, FewShotFields, Method, QueryFields, TemplateFields, WeighingFields
from server.schemas.prompt import stored_media_part
from server.served_model import ServedModel
from server.store.examples import answer_of
from server.store.records import Example
from server.telemetry.metrics import Metrics
from server.telemetry.request_record import RequestRecord
from server.wire import BACKGROUND_PRIORITY


@dataclass(frozen=True, slots=True)
class Query:
    """An example that is left out: the index of its label, and the log-probabilities of all labels by likeness.

    `left_out`: the ids of the example and of those that are left out with it, one of each other label.
    """

    example: Example
    left_out: list[str]
    truth: int
    likeness: dict[str, Array]


@dataclass(frozen=True, slots=True)
class LeaveOneOut:
    """Classifies an example of a support set with shots from the other examples, like `/v1/classify`."""

    shots: ShotSource
    comparison: Comparison
    engine: EngineClient
    model: ServedModel
    metrics: Metrics

    async def answer(
        self, evaluation: Evaluation, plan: EvaluationPlan, prompt: PromptSetting, query: Query, is_timed: bool
    ) -> Outcome:
        record = RequestRecord(evaluation.id, self.metrics)
        record.priority = BACKGROUND_PRIORITY
        fields = self._fields(evaluation, plan, prompt, query.example)
        question = await read_question(fields, self.model, self.shots)
        if prompt.control == "text_only":
            question = without_media(question)
        # with many shots, there is no room to leave out an example of each label
        without = query.left_out[: len(question.examples) - prompt.k]
        assembled = await assemble(question, self.model, self.shots, without=without)
        if prompt.control == "shuffled_labels":
            shuffled = with_shuffled_labels(assembled.shots, f"{prompt.seed} {query.example.id}")
            assembled = await assembled.with_shots(shuffled, self.model)
        weighing = WeighingFields(**{**plan.weighing, "seed": prompt.seed})
        prompts = await prepare_scoring(assembled, plan.candidates, weighing, self.model)
        with record:
            result = await score_in_context(prompts, record, self.engine)
        return Outcome(
            truth=query.truth,
            logs={IN_CONTEXT: result.log_probabilities, **query.likeness},
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            media=record.media,
            media_encoded=record.media_encoded,
            seconds=time.monotonic() - record.arrived if is_timed else None,
        )

    async def warm(self, queries: Sequence[Query]) -> None:
        """Encode the media of these queries; those of the shots have been encoded by earlier queries."""
        store = self.shots.intake.store
        names = [media_id for query in queries for media_id in query.example.media]
        media = await asyncio.to_thread(lambda: [store.find(name) for name in names])
        if media:
            await self.engine.embed(media)

    async def batches(self, evaluation: Evaluation, space: Space) -> list[Callable[[], Awaitable[object]]]:
        """Return the work to embed the examples in a space, as `Retrieval.batches`. Raises `SupportSetNotFound`."""
        version = await self.shots.support_sets.get_version(evaluation.support_set, evaluation.version)
        return self.comparison.retrieval.batches(version, space)

    async def queries(self, evaluation: Evaluation, plan: EvaluationPlan) -> list[Query]:
        """Return the examples that are queries. Raises `SupportSetNotFound`, and the engine's errors."""
        version = await self.shots.support_sets.get_version(evaluation.support_set, evaluation.version)
        labels = [candidate.label for candidate in plan.candidates]
        parts = plan.likeness_parts
        measure = partial(self.comparison.leave_out, version, plan.candidates, measure=left_out_log_probabilities)
        logs = await measure(parts - {ENCODER_FEATURES})
        if ENCODER_FEATURES in parts:
            logs[ENCODER_FEATURES] = (await measure({COMPARED_METHOD}, likeness=unit))[COMPARED_METHOD]
        indices = {example.id: index for index, example in enumerate(version.examples)}

        def build() -> list[Query]:
            left_out = left_out_together([answer_of(example) for example in version.examples])
            return [
                Query(
                    example=(example := version.examples[index]),
                    left_out=[version.examples[other].id for other in left_out(index)],
                    truth=labels.index(answer_of(example)),
                    likeness={part: logs[part][index] for part in parts},
                )
                for index in map(indices.__getitem__, plan.queries)
            ]

        return await asyncio.to_thread(build)  # with thousands of queries and labels it takes seconds

    async def learning_curves(
        self, evaluation: Evaluation, plan: EvaluationPlan, methods: Sequence[Method]
    ) -> dict[str, Curve]:
        """Return the learning curves of methods without a prompt; none for a large set. Raises what `queries` raises."""
        version = await self.shots.support_sets.get_version(evaluation.support_set, evaluation.version)
        if len(version.examples) > MAX_EXAMPLES:
            return {}
        return await self.comparison.leave_out(version, plan.candidates, methods, learning_curve)

    def _fields(
        self, evaluation: Evaluation, plan: EvaluationPlan, prompt: PromptSetting, query: Example
    ) -> FewShotFields:
        choice = plan.template if isinstance(plan.template, str) else TemplateFields(**plan.template)
        template = find_template(choice, self.model)
        fields = template.query_fields
        compares_text = "text" in SPACES.get(prompt.strategy, ())
        return FewShotFields(
            examples=ExamplesFields(
                support_set=evaluation.support_set,
                version=evaluation.version,
                k=prompt.k,
                strategy=prompt.strategy,
                order=plan.order if prompt.k else None,
                seed=prompt.seed,
            ),
            query=QueryFields(
                media=[stored_media_part(media_id) for media_id in query.media] if template.has_media else [],
                question=query.question if "question" in fields or compares_text else "",
                text=query.text if "text" in fields else "",
            ),
            template=choice,
            shots_attend=prompt.shots_attend,
        )
