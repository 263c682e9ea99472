"""Refusals are sentences of the server; the words of the library that compiles grammars are in the log."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from server.grammar import GrammarError
from server.grammar.compiler import LIMITS, Grammars
from server.grammar.refusals import CAUSES, MAX_REASON, refusal
from server.wire import Grammar
from tests.server.grammar.test_compiler import TOKENIZER

TABLE = LLTokenizer(TOKENIZER.to_json(), eos_token=list(TOKENIZER.eos_ids))


def reason_of(value: object) -> str:
    """Return why llguidance itself refuses a schema."""
    return LLMatcher(
        TABLE, LLMatcher.grammar_from_json_schema(json.dumps(value)), limits=LIMITS, log_level=0
    ).get_error()


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "a oneOf has parts that the same value may match"),
        ({"patternProperties": {"^a": {}, "b$": {}}}, "patternProperties has patterns that the same name may match"),
        ({"properties": {"a": {}}, "minProperties": 1}, "minProperties and maxProperties are supported only"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "a part of the schema matches no value"),
        ({"type": "string", "minLength": "x"}, "a keyword has a value of another type"),
        ({"type": "nothing"}, "a type is null, boolean, "),
        ({"type": "string", "pattern": "(a"}, "invalid regular expression: a group is not closed"),
        ({"type": "string", "pattern": "a$b"}, "look-around is not supported"),
        (
            {"type": "string", "pattern": "(.*[ab]{30}c.*)", "minLength": 900, "maxLength": 90_000},
            "take too long together",
        ),
        ({"anyOf": [{"properties": {f"k{i}": {}}} for i in range(2500)]}, "the grammar has too many symbols"),
    ],
)
def test_a_reason_of_the_library_is_a_sentence_of_the_server(value: Any, sentence: str) -> None:
    reason = reason_of(value)
    error = refusal("json", reason)
    assert sentence in str(error)
    assert str(error) in CAUSES.values()
    assert error.reason == reason[:MAX_REASON]


def test_an_unknown_reason_names_the_kind_of_grammar() -> None:
    error = refusal("regex", "called `Result::unwrap()` on an `Err` value")
    assert str(error) == "this regular expression cannot be compiled"


@pytest.mark.parametrize("text", ["[a&&b]", r"[^\x00-\x{10FFFF}]"])
def test_an_expression_that_no_text_matches_is_not_said_to_be_a_schema(text: str) -> None:
    with pytest.raises(GrammarError, match=r"^nothing matches the grammar; in a schema"):
        Grammars(TOKENIZER).compile(Grammar(kind="regex", text=text)).result(60)
