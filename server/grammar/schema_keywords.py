"""Keywords of JSON schemas that llguidance 1.9 does not know: translated where that is exact, else refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from server.grammar import GrammarError
from server.grammar.schema_graph import ALTERNATIVES, PARTS_BY_NAME, Node, escaped, target

# keywords whose values are integers; in JSON schema, 1.0 is one
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
# the largest that llguidance compiles; no answer is as long
LARGEST_COUNT = 2**31 - 1
# formats that llguidance compiles; in JSON schema, any other one is an annotation
FORMATS = ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")
ANNOTATIONS = ("title", "description", "default", "examples", "$comment", "deprecated")
# keywords that restrict values, with what may be done about each
UNSUPPORTED = {
    "propertyNames": "next to additionalProperties, without properties, it may have one of enum with strings, "
    "const with a string, pattern, or minLength and maxLength",
    "uniqueItems": "remove it and check the answer, unless maxItems is at most 1",
    "not": "only {} is, which no value matches",
    "unevaluatedProperties": "use additionalProperties",
    "unevaluatedItems": "use items",
    **dict.fromkeys(("if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies"), "use anyOf"),
    **dict.fromkeys(("contains", "minContains", "maxContains"), "use items or prefixItems"),
    **dict.fromkeys(("$dynamicRef", "$recursiveRef"), "use $ref"),
}
# an escape, a class of characters, or what no grammar has: a group or a bound that looks around, or a reference to a group
TOKEN = re.compile(
    r"(?P<bound>\\[bB])|(?P<reference>\\[1-9k])|\\.|\[(?:\\.|[^\]\\])*\]|(?P<group>\(\?<?[=!])", re.DOTALL
)
# an escape, or the beginning of a negated class, with a first character that has its own meaning elsewhere in a class
NEGATION = re.compile(r"\\.|\[\^(?P<first>[\]-]?)", re.DOTALL)


def translate(node: Node, root: dict[str, Any]) -> None:
    """Replace keywords that llguidance does not know. Raises `GrammarError` for those without an exact replacement."""
    schema = node.schema
    for keyword in COUNTS:
        if isinstance(count := schema.get(keyword), float) and count.is_integer():
            count = schema[keyword] = int(count)
        if isinstance(count, int) and count > LARGEST_COUNT:
            _limit_count(node, keyword)
    if schema.get("format") not in FORMATS:
        schema.pop("format", None)
    if schema.get("not") == {}:
        del schema["not"]
        schema["enum"] = []
    if schema.get("uniqueItems") is False or _has_one_item(schema):
        schema.pop("uniqueItems", None)
    if "propertyNames" in schema:
        _translate_names(node, root)
    _require_tags(schema, root)
    for keyword in schema:
        if keyword in UNSUPPORTED:
            raise GrammarError(f"{node.path} has {keyword}, which is not supported: {UNSUPPORTED[keyword]}")
    for pattern in _patterns(schema):
        _check_pattern(node, pattern)
    if isinstance(text := schema.get("pattern"), str):
        schema["pattern"] = _without_nul(text)
    if isinstance(names := schema.get("patternProperties"), dict):
        schema["patternProperties"] = {_without_nul(name): part for name, part in names.items()}


def _limit_count(node: Node, keyword: str) -> None:
    """Remove an upper bound that no answer reaches. Raises `GrammarError` for a lower one, which no answer meets."""
    if keyword.startswith("min"):
        raise GrammarError(f"{node.path} has a {keyword} above {LARGEST_COUNT}, which no answer can meet")
    del node.schema[keyword]


def _has_one_item(schema: dict[str, Any]) -> bool:
    return isinstance(most := schema.get("maxItems"), int) and most <= 1


def _require_tags(schema: dict[str, Any], root: dict[str, Any]) -> None:
    """Require the property by which alternatives differ, which libraries leave optional if it has a default."""
    for keyword in ALTERNATIVES:
        parts = schema.get(keyword)
        resolved = _distinct(_resolved(part, root) for part in parts) if isinstance(parts, list) else []
        objects = [part for part in resolved if isinstance(part.get("properties"), dict)]
        tags = _tags(schema) or (_common_constants(objects) if keyword == "oneOf" and objects == resolved else set())
        for part in objects if tags else ():
            required = part.setdefault("required", [])
            if isinstance(required, list):
                required += sorted(tags & part["properties"].keys() - set(map(str, required)))


def _distinct(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each object once: thousands of `$ref` may name the same one."""
    return list({id(part): part for part in parts}.values())


def _resolved(part: Any, root: dict[str, Any]) -> dict[str, Any]:
    value = target(root, part["$ref"]) if isinstance(part, dict) and "$ref" in part else part
    return value if isinstance(value, dict) else {}


def _tags(schema: dict[str, Any]) -> set[str]:
    """Return the name that `discriminator` of OpenAPI gives."""
    discriminator = schema.get("discriminator")
    name = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
    return {name} if isinstance(name, str) else set()


def _common_constants(objects: Sequence[dict[str, Any]]) -> set[str]:
    """Return the names of the properties that are constants in all of these schemas."""
    names = [
        {name for name, value in part["properties"].items() if isinstance(value, dict) and "const" in value}
        for part in objects
    ]
    return set.intersection(*names) if names else set()


def _translate_names(node: Node, root: dict[str, Any]) -> None:
    """Replace the limits of names by properties or by a pattern; where this is not exact, `propertyNames` stays."""
    schema = node.schema
    limits = _limits_of_names(schema["propertyNames"], root)
    if limits and any(keyword in schema for keyword in PARTS_BY_NAME):
        return
    value = schema.get("additionalProperties", True)
    if names := _names_of(limits):
        same = {"$ref": f"{node.pointer}/properties/{escaped(names[0])}"} if isinstance(value, dict) else value
        schema["properties"] = {name: value if name == names[0] else same for name in names}
    elif limits and (pattern := _pattern_of(limits)) is not None:
        schema["patternProperties"] = {pattern: value}
    elif limits:
        return
    if limits:
        schema["additionalProperties"] = False
    del schema["propertyNames"]


def _limits_of_names(names: Any, root: dict[str, Any]) -> dict[str, Any]:
    """Return what restricts names, which are strings in any case."""
    if isinstance(names, dict) and names.keys() == {"$ref"}:
        names = target(root, names["$ref"])
    if not isinstance(names, dict):
        return {} if names is True else {"type": names}
    no_limits = {"type": "string"} | ({} if names.get("format") in FORMATS else {"format": names.get("format")})
    return {
        keyword: value
        for keyword, value in names.items()
        if keyword not in ANNOTATIONS and not (keyword in no_limits and no_limits[keyword] == value)
    }


def _names_of(limits: dict[str, Any]) -> list[str]:
    """Return the names within limits that name all of them, else an empty list. A constant that is no string is no name."""
    names = limits.get("enum", [limits.get("const")])
    is_exact = limits.keys() in ({"enum"}, {"const"}) and isinstance(names, list)
    return [name for name in names if isinstance(name, str)] if is_exact else []


def _pattern_of(limits: dict[str, Any]) -> str | None:
    """Return the pattern of the names within limits, None if they are no pattern and no lengths."""
    least, most = limits.get("minLength", 0), limits.get("maxLength", "")
    if limits.keys() == {"pattern"} and isinstance(limits["pattern"], str):
        return limits["pattern"]
    is_number = all(isinstance(bound, int) and bound >= 0 for bound in (least, most) if bound != "")
    return f"^[\\s\\S]{{{least},{most}}}$" if limits.keys() <= {"minLength", "maxLength"} and is_number else None


def _patterns(schema: dict[str, Any]) -> Iterator[str]:
    if isinstance(pattern := schema.get("pattern"), str):
        yield pattern
    if isinstance(names := schema.get("patternProperties"), dict):
        yield from names


def _check_pattern(node: Node, pattern: str) -> None:
    """Check that a pattern needs no backtracking. Raises `GrammarError`."""
    token = next((token for token in TOKEN.finditer(pattern) if token.lastgroup), None)
    if token is None:
        return
    kind = "a reference to a group" if token.lastgroup == "reference" else "look-around"
    hint = f": without it, format {node.schema['format']} is checked" if "format" in node.schema else ""
    raise GrammarError(f"{node.path} has a pattern with {kind}, {token[0]}, which is not supported{hint}")


def _without_nul(pattern: str) -> str:
    """Add NUL to negated classes: in llguidance, one that permits it may permit quotes and backslashes that it excludes."""
    return NEGATION.sub(lambda match: match[0] if match["first"] is None else _negation(match["first"]), pattern)


def _negation(first: str) -> str:
    return rf"[^\x00\{first}" if first else r"[^\x00"
