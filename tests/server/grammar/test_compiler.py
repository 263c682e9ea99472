"""Grammars: what each permits, what is refused, and each compiled once, away from the thread that asks for it."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

from server.grammar import GrammarError
from server.grammar.compiler import MAX_BYTES, MAX_COMPILED, MAX_SYMBOLS, Grammars, check
from server.grammar.matcher import Matcher
from server.wire import Grammar
from tests.tiny_models import prompt_tokenizer

TOKENIZER = prompt_tokenizer()
VOCAB_SIZE = 300
NESTED = "^the schema is nested too deeply: about 60 nested objects are accepted$"


class Watched(Grammars):
    """Grammars that note which are compiled, and wait for `may_compile` before each."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER)
        self.may_compile = threading.Event()
        self.compiled: list[str] = []
        self.threads: set[int] = set()

    def _matcher(self, grammar: Grammar) -> Matcher:
        assert self.may_compile.wait(60)
        self.compiled.append(grammar.text)
        self.threads.add(threading.get_ident())
        return super()._matcher(grammar)


@pytest.fixture
def watched() -> Iterator[Watched]:
    grammars = Watched()
    yield grammars
    grammars.may_compile.set()


def regex(text: str) -> Grammar:
    return Grammar(kind="regex", text=text)


def schema(value: object) -> Grammar:
    return Grammar(kind="json", text=json.dumps(value))


def accept(matcher: Matcher, text: str) -> None:
    for token_id in TOKENIZER.encode_plain(text):
        matcher.accept(token_id)


def permitted(matcher: Matcher) -> str:
    return TOKENIZER.decode([int(i) for i in np.flatnonzero(matcher.allowed(VOCAB_SIZE))], skip_special_tokens=True)


def test_copies_of_a_matcher_are_followed_alone() -> None:
    first = Grammars(TOKENIZER).compile(regex("ca?t")).result()
    copied, other = first.copy(), first.copy()
    accept(copied, "c")
    assert (permitted(copied), permitted(other), permitted(first)) == ("at", "c", "c")
    accept(copied, "t")
    assert (copied.is_complete, other.is_complete) == (True, False)


def test_a_token_that_is_not_permitted_is_an_error_and_no_end() -> None:
    matcher = Grammars(TOKENIZER).compile(regex("cat")).result().copy()
    accept(matcher, "d")
    assert "doesn't satisfy the grammar" in matcher.error
    assert not matcher.is_complete
    assert not matcher.allowed(VOCAB_SIZE).any()


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (regex("a("), "^invalid regular expression: a group is not closed$"),
        (regex(r"\ (?:a()"), "^invalid regular expression: a group is not closed$"),
        (schema({"type": "string", "pattern": "a("}), "^invalid regular expression: a group is not closed$"),
        (regex("a" * 1000 + "(?=b)"), "^look-around is not supported in a regular expression$"),
        (schema({"$ref": "#"}), r"nothing matches the grammar; in a schema, a \$ref may lead back to itself"),
        (schema({"type": "nothing"}), "a type is null, boolean, integer"),
        (Grammar(kind="json", text="{"), "line 1 column 2"),
        (Grammar(kind="json", text='{"items":' * 300 + "{}" + "}" * 300), "a depth of 301, the limit is 250"),
        (Grammar(kind="json", text='{"a":' * 20_000 + "{}" + "}" * 20_000), NESTED),
        (Grammar(kind="json", text='{"properties":{"a":' * 62 + "{}" + "}}" * 62), NESTED),
        (Grammar(kind="json", text='{"const":[1e400]}'), "^not a JSON schema: the number 1e400 is not finite$"),
        (Grammar(kind="json", text='{"minimum":-Infinity}'), "^not a JSON schema: the number -Infinity is not finite$"),
        (Grammar(kind="json", text="[]"), "not a JSON schema: it is an object"),
        (Grammar(kind="json", text='{"a":[{"type":1,"type":2}]}'), "^not a JSON schema: 'type' is set more than once$"),
        (Grammar(kind="choice", choices=()), "at least one string"),
        (Grammar(kind="choice", choices=("a", "")), "no empty string"),
        (regex(r"\w?" * 1001), "the regular expression has 1001 repetitions, the limit is 1000"),
        (regex("a" * (MAX_BYTES + 1)), f"the regular expression has {MAX_BYTES + 1} bytes, the limit is {MAX_BYTES}"),
        (Grammar(kind="choice", choices=("é" * 1024,) * 65), f"the choice has 133120 bytes, the limit is {MAX_BYTES}"),
        (schema({"anyOf": [{"properties": {f"k{i}": {"type": "integer"}}} for i in range(2500)]}), f"{MAX_SYMBOLS}"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused(grammar: Grammar, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        Grammars(TOKENIZER).compile(grammar).result()


def test_the_largest_grammar_is_compiled() -> None:
    values = [f"{i:08x}" for i in range(MAX_BYTES // 12 - 10)]
    grammar = schema({"enum": values})
    check(grammar)
    assert permitted(Grammars(TOKENIZER).compile(grammar).result()) == '"'


def test_a_grammar_is_compiled_once_in_another_thread(watched: Watched) -> None:
    futures = [watched.compile(regex("cat")) for _ in range(16)]
    assert not futures[0].done()
    watched.may_compile.set()
    assert {id(future.result(60)) for future in futures} == {id(futures[0].result())}
    assert watched.compiled == ["cat"]
    assert threading.get_ident() not in watched.threads


def test_the_smallest_waiting_grammar_is_next(watched: Watched) -> None:
    running = watched.compile(regex("a"))
    futures = [watched.compile(regex("b" * length)) for length in (400, 30, 200)]
    watched.may_compile.set()
    for future in [running, *futures]:
        future.result(60)
    # the thread may have taken any of them before the others came
    assert [len(text) for text in watched.compiled[1:]] == sorted(len(text) for text in watched.compiled[1:])


def test_clients_take_turns(watched: Watched) -> None:
    running = watched.compile(regex("a" * 9), client="many")
    futures = [watched.compile(regex("b" * length), client="many") for length in (2, 3)]
    futures += [watched.compile(regex("c" * length), client="one") for length in (5, 4)]
    watched.may_compile.set()
    for future in [running, *futures]:
        future.result(60)
    # the thread may have taken the first one before the others came
    order = [text for text in watched.compiled if len(text) < 9]
    assert order in (["bb", "cccc", "bbb", "ccccc"], ["cccc", "bb", "ccccc", "bbb"])


def test_a_grammar_that_a_busy_client_waits_for_too_is_compiled_in_the_turn_of_another(watched: Watched) -> None:
    futures = [watched.compile(regex("a" * length), client="many") for length in range(1, 9)]
    shared = [watched.compile(regex("shared grammar"), client=client) for client in ("many", "one", "one")]
    watched.may_compile.set()
    for future in [*futures, *shared]:
        future.result(60)
    assert watched.compiled.index("shared grammar") <= 2
    assert len(watched.compiled) == 9


def test_the_grammars_used_last_are_kept(watched: Watched) -> None:
    watched.may_compile.set()
    for number in range(MAX_COMPILED):
        watched.compile(regex(f"x{number}")).result(60)
    watched.compile(regex("x0")).result(60)
    watched.compile(regex("y")).result(60)  # in the place of x1
    for text in ("x0", "x2", "x1"):
        watched.compile(regex(text)).result(60)
    assert watched.compiled[MAX_COMPILED:] == ["y", "x1"]


def test_a_grammar_that_all_requests_have_left_is_not_compiled(watched: Watched) -> None:
    running, left, *shared = [watched.compile(regex(text)) for text in ("a", "bb", "ccc", "ccc")]
    left.leave()
    shared[0].leave()
    watched.may_compile.set()
    assert running.result(60)
    assert shared[1].result(60)
    assert watched.compiled == ["a", "ccc"]
    assert watched.compile(regex("bb")).result(60)


def test_a_panic_of_the_compiler_refuses_the_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*_: object) -> None:
        raise BaseException("panicked")

    monkeypatch.setattr("server.grammar.compiler.source", panic)
    with pytest.raises(GrammarError, match="this regular expression cannot be compiled"):
        Grammars(TOKENIZER).compile(regex("a")).result(60)


def is_permitted(grammar: Grammar, value: str) -> bool:
    matcher = Grammars(TOKENIZER).compile(grammar).result().copy()
    accept(matcher, value)
    return not matcher.error


def test_json_has_no_white_space() -> None:
    grammar = schema({"type": "object"})
    assert is_permitted(grammar, '{"a":[1,{"b":null}]}')
    for value in (" {", "{ ", "{\n", '{"a": 1', '{"a":1, ', '{"a":[1, '):
        assert not is_permitted(grammar, value)


ITEM = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("value", "before"),
    [
        (ITEM, ""),
        ({"type": "object", "properties": {"x": ITEM}}, '{"x":'),
        ({"type": "array", "items": ITEM}, "["),
        ({"type": "array", "prefixItems": [ITEM]}, "["),
        ({"anyOf": [ITEM, {"type": "null"}]}, ""),
        ({"allOf": [ITEM]}, ""),
        ({"$defs": {"item": ITEM}, "$ref": "#/$defs/item"}, ""),
        ({"type": "object", "additionalProperties": ITEM}, '{"x":'),
        ({"elsewhere": ITEM, "$ref": "#/elsewhere"}, ""),
    ],
)
def test_an_object_has_only_the_properties_of_its_schema(value: object, before: str) -> None:
    assert is_permitted(schema(value), before + '{"a":1}')
    assert not is_permitted(schema(value), before + '{"b":1')


@pytest.mark.parametrize(
    "value",
    [
        {**ITEM, "additionalProperties": True},
        {**ITEM, "additionalProperties": {"type": "integer"}},
        {**ITEM, "patternProperties": {"^b$": {"type": "integer"}}},
        {"type": "object"},
        {"allOf": [ITEM, {"type": "object", "properties": {"b": {"type": "integer"}}}]},
    ],
)
def test_an_object_has_further_properties_where_the_schema_says_so(value: object) -> None:
    assert is_permitted(schema(value), '{"a":1,"b":1}')


OTHER = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}


@pytest.mark.parametrize(
    "value",
    [
        {**OTHER, "allOf": [ITEM]},
        {**OTHER, "allOf": [{"$ref": "#/$defs/item"}], "$defs": {"item": ITEM}},
        {**OTHER, "$ref": "#/$defs/item", "$defs": {"item": ITEM}},
        {**OTHER, "anyOf": [{**ITEM, "required": ["a"]}, {"required": ["c"], "properties": {"c": {"type": "null"}}}]},
        {**OTHER, "oneOf": [{"$ref": "#/$defs/item"}], "$defs": {"item": ITEM}},
    ],
)
def test_an_object_has_the_properties_of_all_schemas_that_describe_it(value: dict[str, Any]) -> None:
    texts = ('{"a":1,"b":1}', '{"b":1,"a":1}')  # in the order of the schema
    assert any(is_permitted(schema({**value, "type": "object"}), text) for text in texts)


def test_alternatives_that_only_require_properties_add_none() -> None:
    value = {**ITEM, "anyOf": [{"required": ["a"]}, {"required": []}]}
    assert is_permitted(schema(value), '{"a":1}')
    assert not is_permitted(schema(value), '{"b":1')


@pytest.mark.parametrize(
    ("bounds", "value", "expected"),
    [
        ({}, 10**18 - 1, True),
        ({}, -(10**18) + 1, True),
        ({}, 10**18 + 1, False),
        ({}, -(10**29), False),
        ({"minimum": 0}, 10**18 - 1, True),
        ({"minimum": 0}, 10**19, False),
        ({"exclusiveMaximum": 5}, -(10**18) + 1, True),
        ({"exclusiveMaximum": 5}, -(10**19), False),
        ({"multipleOf": 5}, 10**17, True),
        ({"multipleOf": 5}, 10**19, False),
        ({"minimum": 15 * 10**17}, 1_764_000_000_123_456_789, True),
        ({"minimum": 15 * 10**17}, 10**20, False),
        ({"maximum": -2 * 10**18}, -8 * 10**18, True),
        ({"exclusiveMinimum": 2e18}, 8 * 10**18, True),
        ({"minimum": -(2**63), "maximum": 2**63 - 1}, 8 * 10**18, True),
        ({"minimum": -(2.0**63), "maximum": 2.0**63}, -8 * 10**18, True),
        ({"allOf": [{"minimum": -(2**63)}, {"maximum": 2**63 - 1}]}, -8 * 10**18, True),
        ({"enum": [2 * 10**18, None, ""]}, 2 * 10**18, True),
        ({"const": 2**63 - 1}, 2**63 - 1, True),
    ],
)
def test_an_integer_without_bounds_has_at_most_18_digits(bounds: dict[str, Any], value: int, expected: bool) -> None:
    for kind in ("integer", ["integer", "null"], ["null", "integer"], ["integer", "string"]):
        number = {"type": kind, **bounds}
        assert is_permitted(schema(number), str(value)) is expected
        assert is_permitted(schema({"type": "array", "items": number}), f"[{value}]") is expected


def test_an_integer_that_python_cannot_read_hides_no_number() -> None:
    text = '{"title": 1' + "0" * 5000 + ', "const": -9223372036854775807}'
    with pytest.raises(GrammarError, match="not a JSON schema"):
        Grammars(TOKENIZER).compile(Grammar(kind="json", text=text)).result()


@pytest.mark.parametrize(("multiple", "value"), [(0.25, "7.5"), (2500, "7500"), (4096, "8192"), (1e6, "3000000")])
def test_multiples(multiple: float, value: str) -> None:
    assert is_permitted(schema({"type": "number", "multipleOf": multiple}), value)


@pytest.mark.parametrize("multiple", [True, 0, math.nan, math.inf, "5", None])
def test_a_multiple_that_is_no_positive_number_is_refused(multiple: object) -> None:
    with pytest.raises(GrammarError):
        Grammars(TOKENIZER).compile(schema({"type": "number", "multipleOf": multiple})).result()


def test_a_number_that_may_be_an_integer_has_no_bounds() -> None:
    assert is_permitted(schema({"type": ["integer", "number"]}), str(10**19))


def test_very_many_integers_have_no_bounds() -> None:
    names = [f"k{number}" for number in range(1000)]
    many = {"type": "object", "properties": {name: {"type": "integer"} for name in names}, "required": names}
    assert is_permitted(schema(many), '{"k0":' + "1" * 30)


def test_choices_are_taken_as_they_are() -> None:
    choice = Grammar(kind="choice", choices=('say "hi"', "a|b\\n"))
    for text in choice.choices:
        matcher = Grammars(TOKENIZER).compile(choice).result().copy()
        accept(matcher, text)
        assert matcher.is_complete


ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string"}, "kind": {"enum": ["home", "a place of work"]}},
    "required": ["street", "kind"],
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["name", "children"],
        }
    },
}


def obj(**properties: object) -> dict[str, object]:
    return {"type": "object", "properties": properties, "required": list(properties)}


@pytest.mark.parametrize(
    "value",
    [
        {"type": "string"},
        {"type": "integer"},
        {"type": "array", "items": {"type": "number"}, "minItems": 3},
        {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "null"}, ADDRESS]}},
        {"type": "object", "additionalProperties": {"type": "string"}},
        {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "array", "items": ADDRESS}}},
        obj(
            note={"anyOf": [{"type": "string"}, {"type": "null"}]}, price={"type": "number"}, last={"const": "the end"}
        ),
        obj(
            code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"}, rest=obj(homes={"type": "array", "items": ADDRESS})
        ),
        TREE,
    ],
)
def test_json_of_any_tokens_is_whole_within_its_length(value: dict[str, object]) -> None:
    """Tokens are drawn at random, so that strings and lists have no reason to end before they have to."""
    compiled, max_tokens = Grammars(TOKENIZER).compile(schema(value)).result(), 400
    for seed in range(8):
        matcher, rng, token_ids = compiled.copy(), np.random.default_rng(seed), list[int]()
        while not matcher.is_complete and len(token_ids) < max_tokens:
            ends = matcher.must_end(max_tokens - len(token_ids), max_tokens)
            token_ids.append(int(rng.choice(np.flatnonzero(matcher.allowed(VOCAB_SIZE, ends=ends)))))
            if token_ids[-1] in TOKENIZER.eos_ids:
                break
            matcher.accept(token_ids[-1])
        jsonschema.validate(json.loads(TOKENIZER.decode(token_ids)), value)


def test_only_json_is_brought_to_its_end_and_not_before_half_of_its_length() -> None:
    matcher = Grammars(TOKENIZER).compile(schema(obj(a={"type": "string"}))).result()
    assert [matcher.must_end(num_left, 1000) for num_left in (1, 10, 100)] == [True, True, False]
    assert [matcher.must_end(num_left, 8) for num_left in (8, 5, 4)] == [False, False, True]
    assert not Grammars(TOKENIZER).compile(regex("a*")).result().must_end(1, 10)


def test_what_is_open_ends_at_once() -> None:
    matcher = Grammars(TOKENIZER).compile(schema(obj(a={"type": "number"}, b={"type": "string"}))).result().copy()
    for text, end in [('{"a":1', ","), (',"b":"x', '"'), ('"', "}")]:
        accept(matcher, text)
        assert np.flatnonzero(matcher.allowed(VOCAB_SIZE, ends=True)).tolist() == TOKENIZER.encode_plain(end)
