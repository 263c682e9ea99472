"""Controls of an evaluation: settings of which a part is taken away, to see whether the answers depend on it.

`text_only` takes all images and videos away. If the model answers as well without them, it does not look at them.
`shuffled_labels` gives the shots each other's answers. If the model answers as well then, it does not learn from them.
`encoder_features` takes the model's likeness away: what remains of `nearest_mean` is the standard baseline, which compares
the features of a frozen encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any, Final

from model.likeness import unit
from server.errors import InvalidRequest
from server.fewshot.methods import IN_CONTEXT
from server.fewshot.prompting import Question
from server.fewshot.retrieval import SPACES
from server.fewshot.templates import Shot, Template
from server.quality.recommendation import MAX_P_VALUE, compare, name_of
from server.schemas.fewshot import Method, Strategy
from server.schemas.stored import Control
from server.served_model import ServedModel

# the part of a control cell without a prompt, and the method whose vectors it replaces
ENCODER_FEATURES: Final = "encoder_features"
COMPARED_METHOD: Final = "nearest_mean"
TAKEN_AWAY: Mapping[Control, str] = {
    "text_only": "without images",
    "shuffled_labels": "with shuffled labels",
    ENCODER_FEATURES: "on the features of the encoder",
}
# the verdicts: the answers depend on it, or this may be chance
VERDICTS: Mapping[Control, tuple[str, str]] = {
    "text_only": ("the images matter", "the images may not matter"),
    "shuffled_labels": ("the labels of the shots matter", "the labels of the shots may not matter"),
    ENCODER_FEATURES: ("the model's likeness is better", "the model's likeness may not be better"),
}


def strategy_of_controls(strategies: Sequence[Strategy]) -> Strategy:
    """Return the first strategy that does not select by media, whose choice alone would show the model what they are."""
    return next((strategy for strategy in strategies if "media" not in SPACES.get(strategy, ())), "random")


def check_controls(
    controls: Sequence[Control], methods: Sequence[Method], template: Template, model: ServedModel
) -> None:
    """Check that each control takes away something that a setting has. Raises `InvalidRequest`."""
    for control in controls:
        if obstacle := _obstacle(control, methods, template, model):
            raise InvalidRequest(f"{control} {obstacle}", param="controls")


def _obstacle(control: Control, methods: Sequence[Method], template: Template, model: ServedModel) -> str:
    """Return why a control cannot be evaluated, or nothing if it can."""
    changed = COMPARED_METHOD if control == ENCODER_FEATURES else IN_CONTEXT
    if changed not in methods:
        return f"changes {changed}, which is not evaluated"
    if control == "text_only" and not template.has_media:
        return f"takes media away, and the template {template.name!r} has none"
    if control == ENCODER_FEATURES and model.likeness is unit:
        return (
            f"takes the likeness of a model away, and {changed} compares the features of this model's encoder already"
        )
    return ""


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
    is_needed = paired is not None and paired.lead > 0 and paired.p_value < MAX_P_VALUE
    name = control["control"]
    depends, may_not_depend = VERDICTS[name]
    verdict = depends if is_needed else may_not_depend
    accuracies = f"{control['accuracy']:.3f} {TAKEN_AWAY[name]}, otherwise of {whole['accuracy']:.3f}"
    return f"{name_of(whole)} has an accuracy of {accuracies}: {verdict}."
