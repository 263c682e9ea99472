"""JSON schemas that llguidance compiles slowly or wrongly, or that end its process, are refused; data is not touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from server.grammar import GrammarError
from server.grammar.compiler import Grammars
from server.grammar.schema_limits import (
    MAX_DEPTH,
    MAX_JOINED_PATTERNS,
    MAX_NAME_PATTERNS,
    MAX_PATTERN,
    MAX_PATTERNS,
    MAX_REPETITIONS,
    check_regex,
)
from tests.server.grammar.test_compiler import TOKENIZER, is_permitted, schema

LONG = "^" + "a?" * 1000 + "$"


def compile_schema(value: object) -> None:
    Grammars(TOKENIZER).compile(schema(value)).result()


@pytest.mark.parametrize(
    "value",
    [
        {"const": -(2**63)},
        {"enum": ["a", 1 - 2**63]},
        {"const": {"a": [-(10**30)]}},
        {"type": "integer", "maximum": -(2**63) + 100},
        {"type": "object", "additionalProperties": {"anyOf": [{"type": "integer", "exclusiveMaximum": -9.25e18}]}},
        {"properties": {"const": {"type": "integer", "maximum": -(2**63)}}},
        {"$ref": "#/unknown/default", "unknown": {"default": {"const": -(2**63)}}},
        {"$ref": "#/unknown/def%61ult", "unknown": {"default": {"const": -(2**63)}}},
        {"$ref": "#/unknown/const", "unknown": {"const": {"const": 1}}},
        {"$ref": "#/properties/default", "properties": {"default": {"const": -(2**63)}}},
    ],
)
def test_a_number_that_would_end_the_process_is_refused(value: object) -> None:
    with pytest.raises(GrammarError, match=r" is at least -9000000000000000000, not -|names no schema: \w+ is data"):
        compile_schema(value)


@pytest.mark.parametrize("bound", [{"minimum": 9.1e18}, {"exclusiveMinimum": 2**63 - 1}, {"minimum": 1e308}])
def test_a_lower_bound_that_leaves_no_number_is_refused(bound: dict[str, float]) -> None:
    with pytest.raises(GrammarError, match=rf"^{next(iter(bound))} is at most 9000000000000000000, not "):
        compile_schema({"type": "integer", **bound})


@pytest.mark.parametrize("number", [2**53 + 1, 1_234_567_890_123_456_789, 2**63, 12345678901234567890123, 10**400])
def test_an_integer_that_would_be_written_as_another_one_is_refused(number: int) -> None:
    for value in ({"const": number}, {"enum": ["a", {"b": [number]}]}):
        with pytest.raises(GrammarError, match=r"of a constant is not exact as a 64-bit float: use a string$"):
            compile_schema(value)


@pytest.mark.parametrize("number", [2**53, -(2**62), 2**63 - 1, 3 * 10**18, 10**25, True])
def test_an_exact_integer_is_written_as_it_is(number: int) -> None:
    text = json.dumps(number)
    assert is_permitted(schema({"const": number}), text)
    assert is_permitted(schema({"enum": [[number]]}), f"[{text}]")


@pytest.mark.parametrize(
    "value",
    [
        {"type": "integer", "multipleOf": 10_000_019},
        {"type": "number", "multipleOf": 2**31},
        {"type": "integer", "allOf": [{"multipleOf": 9973}, {"multipleOf": 97}]},
        {"type": "integer", "anyOf": [{"multipleOf": 4096}, {"multipleOf": 900}]},
        {"type": "integer", "multipleOf": 4096, "$ref": "#/$defs/a", "$defs": {"a": {"multipleOf": 900}}},
        {"anyOf": [{"multipleOf": number} for number in range(1, 3000)]},  # of more digits than Python prints
        {"type": "object", "properties": {f"p{i}": {"type": "integer", "multipleOf": 997} for i in range(20)}},
    ],
)
def test_multiples_that_take_very_many_states_are_refused(value: object) -> None:
    with pytest.raises(GrammarError, match=r"^the (common multiple|sum) of all multipleOf, "):
        compile_schema(value)


def test_multiples_of_different_properties_are_independent() -> None:
    size = {"anyOf": [{"type": "integer", "multipleOf": 4096}, {"type": "null"}]}
    value = {"type": "object", "properties": {"bytes": size, "seconds": {"type": "integer", "multipleOf": 900}}}
    assert is_permitted(schema(value), '{"bytes":8192,"seconds":1800}')
    assert not is_permitted(schema(value), '{"bytes":8192,"seconds":1801}')


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"type": "string", "pattern": "a?" * 30_000}, f"a pattern has 60000 characters, the limit is {MAX_PATTERN}$"),
        ({"patternProperties": {"a?" * 3000: {}}}, f"a pattern has 6000 characters, the limit is {MAX_PATTERN}$"),
        (
            {"properties": {str(i): {"pattern": LONG} for i in range(9)}},
            f"18018 characters, the limit is {MAX_PATTERNS}$",
        ),
        (
            {"patternProperties": {f"^field_{i}_": {"type": "integer"} for i in range(150)}},
            f"patternProperties has 150 patterns, the limit is {MAX_NAME_PATTERNS}$",
        ),
    ],
)
def test_patterns_that_take_long_are_refused(value: dict[str, Any], message: str) -> None:
    for nested in (value, {"anyOf": [value, {"type": "null"}]}, {"$ref": "#/elsewhere", "elsewhere": value}):
        with pytest.raises(GrammarError, match=message):
            compile_schema(nested)


@pytest.mark.parametrize(
    "value",
    [
        {"type": "object", "properties": {str(i): {"type": "string", "pattern": LONG} for i in range(8)}},
        {"type": "object", "patternProperties": {f"(a|b)*a(a|b){{9}}{i}$": {} for i in range(MAX_NAME_PATTERNS)}},
    ],
)
def test_patterns_within_the_limits_are_compiled(value: object) -> None:
    compile_schema(value)


@pytest.mark.parametrize(
    "value",
    [
        {"op": "filter", "minimum": -1e18, "multipleOf": 10_000_019},
        {"properties": {"a": 1}},
        {"pattern": "a?" * 3000, "$ref": "#/default"},
        {"patternProperties": dict.fromkeys(map(str, range(100)))},
    ],
)
def test_data_in_a_schema_is_not_read_as_a_schema(value: dict[str, Any]) -> None:
    text = json.dumps(value, separators=(",", ":")).replace("-1e+18", "-1000000000000000000")
    assert is_permitted(schema({"enum": [value]}), text)
    described = {"type": "null", "default": value, "examples": [value | {"minimum": -1e300}]}
    assert is_permitted(schema(described), "null")


def joined(number: int) -> list[dict[str, Any]]:
    return [{"type": "string", "pattern": f"[ab]{{{i + 1}}}"} for i in range(number)]


def of_a_part(schemas: list[dict[str, Any]]) -> list[tuple[dict[str, Any], ...]]:
    """Return schemas of objects and lists, whose part `x` or items have to match all schemas."""
    return [
        tuple({"type": "object", "properties": {"x": value}} for value in schemas),
        tuple({"type": "array", "items": value} for value in schemas),
        (
            *({"type": "object", "properties": {"x": value}} for value in schemas[1:]),
            {"type": "object", "additionalProperties": schemas[0]},
        ),
    ]


@pytest.mark.parametrize("number", [MAX_JOINED_PATTERNS + 1, 20, 500])
def test_very_many_patterns_of_one_value_are_refused(number: int) -> None:
    values = joined(number)
    first, *rest = values
    chain = {str(i): {"$ref": f"#/$defs/{i + 1}", **value} for i, value in enumerate(values[:100])}
    for value in (
        {"allOf": values},
        {**first, "allOf": rest},
        {**first, "anyOf": [{"type": "null"}, {"allOf": rest}]},
        {"allOf": [{"allOf": values[:3]}, {"oneOf": [{"allOf": values[3:]}]}]},
        {"$ref": "#/$defs/a", "allOf": rest, "$defs": {"a": first}},
        {"$ref": "#/$defs/0", "$defs": {**chain, str(len(chain)): {}}},
        *({"allOf": [*parts]} for parts in of_a_part(values)),
    ):
        with pytest.raises(GrammarError, match=rf"patterns and formats.*the limit is {MAX_JOINED_PATTERNS}$"):
            compile_schema({"properties": {"a": {"type": "null"}, "b": value}, "$defs": value.get("$defs", {})})


def test_a_format_is_a_pattern() -> None:
    with pytest.raises(GrammarError, match=r"^#/properties/b: a value may have to match 7 patterns and formats, "):
        compile_schema({"properties": {"b": {"allOf": [*joined(MAX_JOINED_PATTERNS), {"format": "date"}]}}})


def test_many_patterns_of_different_values_are_compiled() -> None:
    dates = [{"type": "object", "properties": {f"d{i}": {"type": "string", "format": "date"}}} for i in range(40)]
    compile_schema({"allOf": dates})
    compile_schema({"anyOf": joined(40)})
    compile_schema({"type": "object", "properties": {f"p{i}": {"anyOf": joined(3)} for i in range(20)}})
    compile_schema({"allOf": joined(2)})


def chain_of(length: int, step: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Return a schema of definitions each of which names the next one."""
    names = {str(i): step({"$ref": f"#/$defs/{i + 1}"}) for i in range(length)}
    return {"$ref": "#/$defs/0", "$defs": {**names, str(length): {"type": "null"}}}


STEPS: list[Callable[[dict[str, Any]], dict[str, Any]]] = [
    lambda value: value,
    lambda value: {"type": "array", "items": value},
    lambda value: {"type": "array", "prefixItems": [value]},
    lambda value: {"type": "object", "properties": {"a": value}},
    lambda value: {"type": "object", "patternProperties": {"a": value}},
    lambda value: {"type": "object", "additionalProperties": value},
    lambda value: {"anyOf": [value, {"type": "boolean"}]},
    lambda value: {"oneOf": [value]},
    lambda value: {"allOf": [value]},
    lambda value: {"minLength": 1, **value},
    lambda value: {"type": "object", "properties": {"a": {"items": {"anyOf": [value, {"type": "boolean"}]}}}},
]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("length", [MAX_DEPTH, 1000])
def test_a_chain_of_references_that_overflows_a_stack_is_refused(
    step: Callable[[dict[str, Any]], dict[str, Any]], length: int
) -> None:
    with pytest.raises(GrammarError, match=rf"have a depth of \d+, the limit is {MAX_DEPTH}$"):
        compile_schema(chain_of(length, step))


@pytest.mark.parametrize("step", STEPS)
def test_a_chain_of_references_within_the_limit_is_compiled(
    step: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    compile_schema(chain_of(40, step))


def test_the_depth_of_a_schema_is_that_of_its_longest_path() -> None:
    """The chain is long only if its references are followed again, from definitions that were read before."""
    chain = chain_of(MAX_DEPTH, lambda value: {"type": "array", "items": value})
    before = [{"$ref": f"#/$defs/{i}"} for i in reversed(range(MAX_DEPTH))]
    with pytest.raises(GrammarError, match=r"have a depth of 50\d,"):
        compile_schema({"anyOf": before, "$defs": chain["$defs"]})


def test_the_depth_of_definitions_that_name_each_other_is_found_at_once() -> None:
    names = [f"n{i}" for i in range(60)]
    node = {"anyOf": [{"type": "array", "items": {"$ref": f"#/$defs/{name}"}} for name in names]}
    value = {"$ref": "#/$defs/n0", "$defs": dict.fromkeys(names, node)}
    with pytest.raises(GrammarError):  # llguidance finds it too large
        compile_schema(value)
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}}}
    compile_schema(tree)


@pytest.mark.parametrize("text", ["a?" * (MAX_REPETITIONS + 1), r"\w?" * 40_000, "(a|b){1,2}" * 2000, ".*x" * 3000])
def test_a_regular_expression_with_very_many_repetitions_is_refused(text: str) -> None:
    with pytest.raises(GrammarError, match=rf"has \d+ repetitions, the limit is {MAX_REPETITIONS}$"):
        check_regex(text)


@pytest.mark.parametrize("text", ["", "a?" * MAX_REPETITIONS, "|".join(f"word{i}" for i in range(10_000))])
def test_a_regular_expression_with_some_repetitions_is_within_the_limits(text: str) -> None:
    check_regex(text)
