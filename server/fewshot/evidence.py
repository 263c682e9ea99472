"""Gathers the evidence for the candidates of one question: the language model's scores, likeness to the examples, or both.

`prepare_question` finds all errors of a request before the engine works on it and its record begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.concurrency import run_both
from server.engine_client.client import EngineClient
from server.fewshot.candidates import Candidate
from server.fewshot.classification import InContext, ScoringPrompts, prepare_scoring, score_in_context
from server.fewshot.comparison import ChosenMethod, Comparison
from server.fewshot.methods.likeness import Array
from server.fewshot.prompting import AssembledPrompt, Question, assemble
from server.fewshot.shots import ShotSource
from server.prompt import encode_text
from server.schemas.fewshot import WeighingFields
from server.served_model import ServedModel
from server.telemetry.request_record import RequestRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedQuestion:
    """A question with its method, and with its prompts if the language model takes part."""

    question: Question
    chosen: ChosenMethod
    assembled: AssembledPrompt | None = None
    prompts: ScoringPrompts | None = None


async def prepare_question(
    question: Question,
    candidates: Sequence[Candidate],
    chosen: ChosenMethod,
    weighing: WeighingFields,
    model: ServedModel,
    source: ShotSource,
) -> PreparedQuestion:
    """Write the prompts of a question. Raises `InvalidRequest`, and errors of stored media and the engine."""
    if not chosen.reads_prompt:
        return PreparedQuestion(question=question, chosen=chosen)
    token_ids = await model.tokenize.each(lambda each: encode_text(each.text, model, each.param), candidates)
    assembled = await assemble(question, model, source, room=max(map(len, token_ids)) + 1)
    prompts = await prepare_scoring(assembled, candidates, weighing, model)
    return PreparedQuestion(question=question, chosen=chosen, assembled=assembled, prompts=prompts)


async def gather(
    prepared: PreparedQuestion, record: RequestRecord, comparison: Comparison, engine: EngineClient
) -> tuple[InContext | None, Mapping[str, Array]]:
    """Return the evidence of the method's parts: the language model's, and that of likeness. Raises the engine's errors."""
    question, chosen = prepared.question, prepared.chosen
    if prepared.prompts is not None:
        scoring = score_in_context(prepared.prompts, record, engine)
        return await run_both(scoring, comparison.compare(question, chosen))
    record.begin_prompt(0, question.query.media)
    likeness = await comparison.compare(question, chosen)
    record.begun(0)
    return None, likeness
