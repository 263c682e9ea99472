"""Controls of an evaluation: prompts of which a part is taken away, to see whether the answers depend on it.

`text_only` takes all images and videos away. If the model answers as well without them, it does not look at them.
`shuffled_labels` gives the shots each other's answers. If the model answers as well then, it does not learn from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from server.errors import InvalidRequest
from server.fewshot.methods import IN_CONTEXT
from server.fewshot.prompting import Question
from server.fewshot.retrieval import SPACES
from server.fewshot.templates import Shot, Template
from server.quality.recommendation import MAX_P_VALUE, compare, name_of
from server.schemas.fewshot import Method, Strategy
from server.schemas.stored import Control

TAKEN_AWAY: Mapping[Control, str] = {"text_only": "without images", "shuffled_labels": "with shuffled labels"}
NEEDED: Mapping[Control, str] = {"text_only": "the images", "shuffled_labels": "the labels of the shots"}


def strategy_of_controls(strategies: Sequence[Strategy]) -> Strategy:
    """Return the first strategy that does not select by media, whose choice alone would show the model what they are."""
    return next((strategy for strategy in strategies if "media" not in SPACES.get(strategy, ())), "random")


def check_controls(controls: Sequence[Control], methods: Sequence[Method], template: Template) -> None:
    """Raises `InvalidRequest` for controls that take away what no prompt has."""
    if controls and IN_CONTEXT not in methods:
        raise InvalidRequest(f"controls change the prompts of {IN_CONTEXT}, which is not evaluated", param="controls")
    if "text_only" in controls and not template.has_media:
        message = f"text_only takes media away, and the template {template.name!r} has none"
        raise InvalidRequest(message, param="controls")


def without_media(question: Question) -> Question:
    """Return the question without any media in the prompt."""
    text_only = question.fields.model_copy(update={"zero_shot": True, "shots_attend": "previous"})
    return replace(question, fields=text_only, query=replace(question.query, media=()))


def with_shuffled_labels(shots: Sequence[Shot], seed: str) -> list[Shot]:
    """Return the shots with their answers in a random order."""
    answers = [(shot.label, shot.text) for shot in shots]
    Random(seed).shuffle(answers)
    return [replace(shot, label=label, text=text) for shot, (label, text) in zip(shots, answers, strict=True)]


def judge_controls(rows: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence per control that has finished: whether what it takes away is needed."""
    by_setting = {_prompt_of(row): row for row in rows if row["control"] is None}
    return [
        _judge(row, whole, cells)
        for row in rows
        if row["control"] is not None and (whole := by_setting.get(_prompt_of(row))) is not None
    ]


def _prompt_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["method"], row["strategy"], row["k"], row["shots_attend"]


def _judge(control: Mapping[str, Any], whole: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    paired = compare(whole, control, cells)
    is_needed = paired is not None and paired.wins > paired.losses and paired.p_value < MAX_P_VALUE
    name = control["control"]
    verdict = f"{NEEDED[name]} matter" if is_needed else f"{NEEDED[name]} may not matter"
    accuracies = f"{control['accuracy']:.3f} {TAKEN_AWAY[name]} and of {whole['accuracy']:.3f} as sent"
    return f"{name_of(whole)} has an accuracy of {accuracies}: {verdict}."
