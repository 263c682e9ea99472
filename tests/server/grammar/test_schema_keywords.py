"""Keywords that the compiler does not know: translated, or refused by a message that names the property."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.grammar import GrammarError
from server.grammar.json_schema import closed
from server.grammar.schema_graph import Node
from server.grammar.schema_keywords import FORMATS, UNSUPPORTED, translate
from tests.server.grammar.test_compiler import is_permitted, schema
from tests.server.grammar.test_schema_limits import compile_schema

NUMBER = {"type": "number"}


def obj(**properties: object) -> dict[str, object]:
    return {"type": "object", "properties": properties}


@pytest.mark.parametrize(
    "format_name", ["path", "password", "binary", "ipvanyaddress", "int32", "regex", "x", None, ["a"]]
)
def test_a_format_that_is_not_known_is_an_annotation(format_name: object) -> None:
    assert is_permitted(schema({"type": "string", "format": format_name}), '"any text"')


@pytest.mark.parametrize(
    ("format_name", "value"),
    [
        ("date-time", "2020-01-01T00:00:00Z"),
        ("date", "2020-01-01"),
        ("time", "12:00:00Z"),
        ("duration", "P1D"),
        ("email", "a@b.co"),
        ("hostname", "b.co"),
        ("ipv4", "1.2.3.4"),
        ("ipv6", "::1"),
        ("uri", "http://b.co/"),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000"),
    ],
)
def test_a_format_that_is_known_is_checked(format_name: str, value: str) -> None:
    assert format_name in FORMATS
    grammar = schema({"type": "string", "format": format_name})
    assert is_permitted(grammar, json.dumps(value))
    assert not is_permitted(grammar, '"\\u00df "')


VALUES: dict[str, object] = {
    "propertyNames": {"format": "date"},
    "uniqueItems": True,
    "not": {"type": "null"},
    "minContains": 1,
    "maxContains": 1,
    "unevaluatedItems": False,
    "unevaluatedProperties": False,
    "$dynamicRef": "#a",
    "$recursiveRef": "#",
}


@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_a_keyword_that_is_not_supported_is_named_with_its_path(keyword: str) -> None:
    part = {keyword: VALUES.get(keyword, {})}
    for value, path in [
        (part, "the schema"),
        (obj(a=part), "#/properties/a"),
        (obj(a={"type": "array", "items": part}), "#/properties/a/items"),
        ({"anyOf": [{"type": "null"}, part]}, "#/anyOf/1"),
        ({"$ref": "#/$defs/x", "$defs": {"x": part}}, "#/$defs/x"),
        (obj(**{"a/b~c": {"allOf": [part]}}), "#/properties/a~1b~0c/allOf/0"),
    ]:
        with pytest.raises(GrammarError) as error:
            compile_schema(value)
        assert str(error.value) == f"{path} has {keyword}, which is not supported: {UNSUPPORTED[keyword]}"


def test_a_long_path_is_cut_at_its_beginning() -> None:
    with pytest.raises(GrammarError, match=r"^…x{50,}/properties/b has if, which"):
        compile_schema(obj(**{"x" * 1000: obj(b={"if": {}})}))


@pytest.mark.parametrize(
    "value",
    [
        {"$defs": {"a": {"not": {"type": "null"}}}},
        {"x-note": {"if": {"uniqueItems": True}}},
        {"const": {"not": 1, "format": "x", "$id": "y", "x-guidance": 1}},
        {"x-guidance": {"no such option": 1}},
        {"$schema": "http://json-schema.org/draft-04/schema#", "id": "a", "$anchor": "b"},
        {"$schema": "no such draft", "$id": "#no id"},
        {"propertyNames": {"type": "string"}},
        {"propertyNames": True},
        {"propertyNames": {"format": "x", "description": "names"}},
        {"uniqueItems": False},
        {"uniqueItems": True, "maxItems": 1},
    ],
)
def test_what_restricts_no_value_is_accepted(value: dict[str, Any]) -> None:
    compile_schema(value)
    text = json.dumps(value.get("const", {"a": [1]}), separators=(",", ":"))
    assert is_permitted(schema(value), text)


def test_a_property_of_no_value_is_left_out() -> None:
    never = schema(obj(a={"not": {}}, b=NUMBER))
    assert is_permitted(never, '{"b":1}')
    assert not is_permitted(never, '{"a":')


COLOURS = {"$defs": {"Colour": {"enum": ["red", "a/b~ %"], "title": "Colour", "type": "string"}}}


@pytest.mark.parametrize("names", [{"enum": ["red", "a/b~ %"]}, {"$ref": "#/$defs/Colour"}])
def test_names_of_an_enumeration_are_properties(names: object) -> None:
    value = {"type": "object", "propertyNames": names, "additionalProperties": {"type": "integer"}}
    for grammar in (schema({**value, **COLOURS}), schema({**obj(x=value), **COLOURS})):
        before = "" if "propertyNames" in json.loads(grammar.text) else '{"x":'
        for text in ("{}", '{"red":1}', '{"red":1,"a/b~ %":2}', '{"a/b~ %":2}'):
            assert is_permitted(grammar, before + text)
        for text in ('{"blue":', '{"red":"', '{"red":1,"a/b~ %":"'):
            assert not is_permitted(grammar, before + text)


def test_the_values_of_an_enumeration_of_names_are_nested() -> None:
    inner = {"type": "object", "propertyNames": {"enum": ["c", "d"]}, "additionalProperties": NUMBER}
    grammar = schema({"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": inner})
    assert is_permitted(grammar, '{"a":{"d":1},"b":{"c":1,"d":2}}')
    for text in ('{"c":', '{"a":{"a":', '{"b":{"b":', '{"b":{"c":"'):
        assert not is_permitted(grammar, text)
    _, words = closed(grammar.text)
    assert words == ["a", "b", "c", "d"]


def test_constants_that_are_no_strings_are_no_names() -> None:
    grammar = schema({"type": "object", "propertyNames": {"enum": ["a", "a", 1]}, "additionalProperties": NUMBER})
    assert is_permitted(grammar, '{"a":1}')
    assert not is_permitted(grammar, '{"1"')


def test_one_name_and_any_value() -> None:
    grammar = schema({"type": "object", "propertyNames": {"const": "a"}})
    assert is_permitted(grammar, '{"a":[1]}')
    assert not is_permitted(grammar, '{"b"')


@pytest.mark.parametrize(
    ("names", "permitted", "refused"),
    [
        ({"pattern": "^[a-z]+$"}, "abc", "aB"),
        ({"type": "string", "pattern": "b", "title": "names"}, "abc", "acc"),
        ({"minLength": 2}, 'ä"', "ä"),
        ({"minLength": 2, "maxLength": 3}, "a\nb", "abcd"),
        ({"maxLength": 1}, "", "ab"),
    ],
)
def test_names_of_a_pattern_or_of_a_length(names: object, permitted: str, refused: str) -> None:
    grammar = schema({"type": "object", "propertyNames": names, "additionalProperties": NUMBER})
    assert is_permitted(grammar, "{" + json.dumps(permitted, ensure_ascii=False) + ":1}")
    assert not is_permitted(grammar, "{" + json.dumps(refused, ensure_ascii=False) + ":1}")


@pytest.mark.parametrize(
    "names",
    [
        {"pattern": "a", "minLength": 2},
        {"enum": [1]},
        {"enum": []},
        {"enum": "a"},
        {"minLength": -1},
        {"minLength": "1"},
        {"pattern": 1},
        {"anyOf": [{"const": "a"}]},
        {"type": "integer"},
        False,
        {"$ref": "#/$defs/x", "minLength": 1},
    ],
)
def test_limits_of_names_that_are_not_exact_are_refused(names: object) -> None:
    with pytest.raises(GrammarError, match=r"^the schema has propertyNames, which is not supported: "):
        compile_schema({"type": "object", "propertyNames": names})


class Counted(dict[str, object]):
    """An object that counts how often a part of it is set unless it is there."""

    count = 0

    def setdefault(self, *arguments: Any) -> Any:
        self.count += 1
        return super().setdefault(*arguments)


def test_an_object_that_many_references_name_is_read_once() -> None:
    part = Counted(properties={"kind": {"const": "a"}}, required=[])
    root = {"$defs": {"a": part}, "oneOf": [{"$ref": "#/$defs/a"}] * 9}
    translate(Node(root), root)
    assert (part["required"], part.count) == (["kind"], 1)


def test_limits_of_the_names_of_properties_are_refused() -> None:
    with pytest.raises(GrammarError, match="has propertyNames"):
        compile_schema(obj(a=NUMBER) | {"propertyNames": {"pattern": "^a$"}})


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        (r"^(?!\.)(?!.*\.\.)[a-z]+@", r"look-around, \(\?!"),
        ("(?<=a)b", r"look-around, \(\?<="),
        (r"\bcat", r"look-around, \\b"),
        (r"(a)\1", r"a reference to a group, \\1"),
    ],
)
def test_a_pattern_that_no_grammar_has_is_named(pattern: str, kind: str) -> None:
    with pytest.raises(GrammarError, match=f"^#/properties/a has a pattern with {kind}, which is not supported$"):
        compile_schema(obj(a={"type": "string", "pattern": pattern}))
    with pytest.raises(GrammarError, match=f"^the schema has a pattern with {kind}"):
        compile_schema({"patternProperties": {pattern: {}}})
    with pytest.raises(GrammarError, match=r"not supported: without it, format email is checked$"):
        compile_schema(obj(a={"type": "string", "format": "email", "pattern": pattern}))


@pytest.mark.parametrize("pattern", [r"\(?=a", "[(?=]", r"\\b", "(?:a)", "(?<name>a)"])
def test_a_pattern_that_only_seems_to_look_around_is_compiled(pattern: str) -> None:
    compile_schema({"type": "string", "pattern": pattern})


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("#/$defs/y", "names no schema"),
        ("#/$defs", "names no schema"),
        ("#/properties", "names no schema"),
        ("#/$defs/x/type", "names no schema"),
        ("#/allOf/00", "names no schema"),
        ("#/allOf/1", "names no schema"),
        ("#/default/a", "names no schema: default is data"),
        ("#x", "is not supported: use a JSON pointer such as '#/\\$defs/name'"),
        ("http://json-schema.org/draft-07/schema#", "is not supported: use a JSON pointer"),
        ("", "is not supported: use a JSON pointer"),
        (1, "is not supported: use a JSON pointer"),
    ],
)
def test_a_reference_to_no_schema_is_named(reference: object, message: str) -> None:
    value = {
        "$defs": {"x": {"$anchor": "x", "type": "string"}},
        "default": {"a": {}},
        "properties": {"a": {"$ref": reference}},
        "allOf": [{"type": "object"}],
    }
    with pytest.raises(GrammarError, match=rf"^the \$ref .* {message}"):
        compile_schema(value)


def test_references_are_pointers_from_the_root() -> None:
    value = {
        "$id": "http://a/b",
        "$ref": "#/$defs/inner/$defs/x",
        "$defs": {
            "inner": {"$id": "http://c/", "$defs": {"x": {"$ref": "#/$defs/y"}, "y": NUMBER}},
            "y": {"type": "null"},
        },
    }
    assert is_permitted(schema(value), "null")


def test_a_required_name_without_a_schema_has_any_value() -> None:
    value = obj(a=NUMBER) | {"required": ["a", "b"]}
    assert is_permitted(schema(value), '{"a":1,"b":[1,{"c":"d"}]}')
    assert not is_permitted(schema(value), '{"a":1,"b":2,')
    assert not is_permitted(schema(value), '{"a":1}')
    strict = value | {"additionalProperties": NUMBER}
    assert is_permitted(schema(strict), '{"a":1,"b":2}')
    assert not is_permitted(schema(strict), '{"a":1,"b":"')


def test_the_number_of_a_count_may_be_written_as_a_fraction() -> None:
    assert is_permitted(schema({"type": "string", "minLength": 1.0, "maxLength": 2.0}), '"ab"')
    assert not is_permitted(schema({"type": "string", "minLength": 1.0, "maxLength": 2.0}), '"abc"')
    with pytest.raises(GrammarError, match="a keyword has a value of another type"):
        compile_schema({"type": "string", "minLength": 1.5})


@pytest.mark.parametrize(("kind", "keyword"), [("string", "Length"), ("array", "Items"), ("object", "Properties")])
def test_a_count_that_no_answer_reaches_is_no_upper_bound_and_a_wrong_lower_one(kind: str, keyword: str) -> None:
    value = {"string": '"any"', "array": "[1]", "object": "{}"}[kind]
    for count in (2**31 - 1, 2**31, 2**32, 2**64, 1e15):
        assert is_permitted(schema({"type": kind, f"max{keyword}": count, "items": NUMBER}), value)
    with pytest.raises(GrammarError, match=f"properties/a has a min{keyword} above 2147483647"):
        closed(json.dumps(obj(a={"type": kind, f"min{keyword}": 2**33})))
