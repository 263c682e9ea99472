"""The limits and the fields that docs/api.md states in sentences are those of the server."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from annotated_types import MaxLen
from pydantic import BaseModel

from server.grammar import GrammarError
from server.grammar.compiler import MAX_BYTES, MAX_SYMBOLS, Grammars
from server.grammar.schema_limits import MAX_DEPTH, MAX_REPETITIONS
from server.limits.deadline import MAX_SECONDS
from server.schemas.fewshot import ClassifyRequest
from server.schemas.generation import StructuredOutputs
from server.schemas.responses.evaluations import Recommendation, RecommendedRequest
from server.schemas.stored import EvaluateRequest
from server.setting_values import MIN_KEY_LENGTH
from tests.server.grammar.test_compiler import TOKENIZER, schema
from tests.server.test_docs import API, OPERATIONS, names, rows, section

OUTPUTS = API.partition("\n### Structured outputs\n")[2].partition("\n## ")[0]
RECOMMENDATION = API.partition("\n### Recommendation\n")[2].partition("\n## ")[0]
INTEGER = {"type": "integer"}


def listed(text: str, after: str) -> str:
    """Return the list that follows these words."""
    return text.partition(after)[2].partition("\n\n")[2].partition("\n\n")[0]


def max_length(model: type[BaseModel], name: str) -> int:
    (length,) = (data.max_length for data in model.model_fields[name].metadata if isinstance(data, MaxLen))
    return length


def test_the_fields_of_a_recommendation_are_those_of_its_request_and_a_description() -> None:
    sent = {
        name
        for line in listed(RECOMMENDATION, "It has these fields").splitlines()
        for name in names(line.partition(":")[0])
    }
    described = {
        name for line in listed(RECOMMENDATION, "describe it").splitlines() for name in names(line.partition(":")[0])
    }
    assert sent == RecommendedRequest.model_fields.keys()
    assert sent <= ClassifyRequest.model_fields.keys()
    assert described == Recommendation.model_fields.keys() - {"request"}


def test_the_limits_of_structured_outputs_are_listed() -> None:
    numbers = [
        [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\d", line)]
        for line in listed(OUTPUTS, "**Limits:**").splitlines()
    ]
    text_of_choice = 4096
    with pytest.raises(ValueError, match=f"at most {text_of_choice} characters"):
        StructuredOutputs(choice=["a" * (text_of_choice + 1)])
    assert numbers == [
        [max_length(StructuredOutputs, "choice"), text_of_choice, MAX_BYTES],
        [max_length(StructuredOutputs, "regex"), MAX_REPETITIONS],
        [MAX_BYTES],
        [MAX_SYMBOLS],
    ]
    assert f"more than {MAX_DEPTH} schemas in each other" in OUTPUTS


@pytest.mark.parametrize(
    ("words", "wrap"),
    [
        (r"at most (\d+) such objects", lambda inner: {"type": "object", "properties": {"a": inner}}),
        (r"or (\d+) such arrays", lambda inner: {"type": "array", "items": inner}),
    ],
)
def test_schemas_may_be_in_each_other_as_often_as_stated(words: str, wrap: Callable[[object], Any]) -> None:
    (number,) = re.findall(words, " ".join(OUTPUTS.split()))
    value: object = INTEGER
    for _ in range(int(number)):
        value = wrap(value)
    Grammars(TOKENIZER).compile(schema(value)).result()
    with pytest.raises(GrammarError, match="the schema is nested too deeply"):
        Grammars(TOKENIZER).compile(schema(wrap(value))).result()


def test_the_limits_of_lists_in_an_evaluation_are_stated() -> None:
    meanings = {names(row[0])[0]: row[2] for row in rows(section(API, "Evaluation of a support set")) if len(row) == 3}
    for name in ("k", "strategies", "methods", "seeds"):
        assert meanings[name].startswith(f"Up to {max_length(EvaluateRequest, name)}"), name


def test_the_longest_deadline_is_stated() -> None:
    assert f"up to {MAX_SECONDS:,.0f}" in section(API, "Deadlines")


def test_the_length_of_a_key_is_stated() -> None:
    assert f"at least {MIN_KEY_LENGTH} characters" in section(OPERATIONS, "Keys")
