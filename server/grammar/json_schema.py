"""Prepares JSON schemas for llguidance: closes their objects and bounds their integers."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from server.grammar import GrammarError
from server.grammar.refusals import refusal
from server.grammar.schema_graph import ALTERNATIVES, DATA, MAX_SHOWN, SUBSCHEMAS_BY_NAME, Node, nodes_of
from server.grammar.schema_keywords import translate
from server.grammar.schema_limits import LARGEST_NUMBER, LOWER_BOUNDS, limit_schemas

# names of a schema: without them, a `$ref` is a pointer from the root, and every schema is of draft 2020-12
IDENTIFIERS = ("$schema", "$id", "id", "$anchor", "$dynamicAnchor", "$recursiveAnchor")
# llguidance reads its own options here; those of the server apply to all schemas
OPTIONS = "x-guidance"
# bound of integers: llguidance reads bounds as 64-bit floats, which represent this one exactly
LARGEST_INTEGER = 10**18
# limit of bounded integers, which take much more of a grammar than unbounded ones
MAX_BOUNDED = 100
UPPER_BOUNDS = ("maximum", "exclusiveMaximum")


def closed(text: str) -> tuple[str, list[Any]]:
    """Return a JSON schema whose objects have only the named properties, and whose integers fit 64 bits, and its words.

    Otherwise a model may invent properties or digits endlessly. Existing keywords about either stay, and integers of a
    schema with very many stay unbounded. Words are texts that an answer may have to write before its end. Raises
    `GrammarError` for a text that is no JSON schema, and what `translate` and `limit_schemas` raise.
    """
    nodes = _nodes(text)
    limit_schemas(nodes)
    schemas = [node.schema for node in nodes]
    words = _words_of(schemas)
    # several parts of one object would forbid the properties of each other
    if not any(_num_parts(schema) > 1 for schema in schemas):
        _close(schemas)
    return json.dumps(schemas[0]), words


def _close(schemas: Sequence[dict[str, Any]]) -> None:
    for schema in schemas:
        _close_object(schema)
    integers = [schema for schema in schemas if _is_integer(schema.get("type"))]
    for schema in integers if len(integers) <= MAX_BOUNDED else ():
        _bound(schema)


def _close_object(schema: dict[str, Any]) -> None:
    if not isinstance(properties := schema.get("properties"), dict) or "additionalProperties" in schema:
        return
    is_open = schema["additionalProperties"] = "patternProperties" in schema
    required = schema.get("required")
    for name in required if isinstance(required, list) and not is_open else ():
        if isinstance(name, str):
            properties.setdefault(name, True)  # any value


def _num_parts(schema: dict[str, Any]) -> int:
    """Return the number of schemas that describe the properties of one value together."""
    num_keywords = sum(keyword in schema for keyword in ("properties", "$ref"))
    num_joined = len(parts) if isinstance(parts := schema.get("allOf"), list) else 0
    choices = [values for keyword in ALTERNATIVES if isinstance(values := schema.get(keyword), list)]
    return num_keywords + num_joined + sum(any(map(_has_properties, values)) for values in choices)


def _has_properties(schema: Any) -> bool:
    """Return whether a schema may define properties, rather than only require some."""
    keywords = ("properties", "$ref", "allOf", *ALTERNATIVES)
    return isinstance(schema, dict) and any(keyword in schema for keyword in keywords)


def _is_integer(kind: Any) -> bool:
    """Return whether a type has integers but no other numbers, which the bounds would limit, too."""
    kinds = kind if isinstance(kind, list) else [kind]
    return "integer" in kinds and "number" not in kinds


def _bound(schema: dict[str, Any]) -> None:
    """Add the bounds that an integer lacks, unless it is a constant; they are larger if the schema has a large bound."""
    if "enum" in schema or "const" in schema:
        return
    bounds = [schema[name] for name in LOWER_BOUNDS + UPPER_BOUNDS if name in schema]
    is_large = any(isinstance(bound, int | float) and abs(bound) >= LARGEST_INTEGER for bound in bounds)
    largest = LARGEST_NUMBER if is_large else LARGEST_INTEGER
    for names, bound in ((LOWER_BOUNDS, -largest), (UPPER_BOUNDS, largest)):
        if not any(name in schema for name in names):
            schema[names[0]] = bound


def _words_of(schemas: Iterable[dict[str, Any]]) -> list[Any]:
    """Return the names of the properties and the longest constants."""
    words: list[Any] = []
    for schema in schemas:
        if isinstance(properties := schema.get("properties"), dict):
            words += properties
        if isinstance(constants := schema.get("enum"), list) and constants:
            words.append(max(constants, key=lambda constant: len(json.dumps(constant))))
        words += [schema["const"]] if "const" in schema else []
    return words


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. Raises ValueError if it has a name twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{name[:MAX_SHOWN]!r} is set more than once")
    return values


def _nodes(text: str) -> list[Node]:
    """Return the schemas that a JSON schema reaches, translated. Raises `GrammarError`."""
    try:
        root = json.loads(text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_unique)
    except ValueError as error:
        raise GrammarError(f"not a JSON schema: {error}") from None
    except RecursionError as error:
        raise refusal("json", str(error)) from None
    if not isinstance(root, dict):
        raise GrammarError("not a JSON schema: it is an object")
    root.pop(OPTIONS, None)
    _remove_identifiers(root)
    return nodes_of(root, translate)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:MAX_SHOWN]} is not finite")
    return number


def _remove_identifiers(root: dict[str, Any]) -> None:
    """Remove the names of all schemas, also under unknown keywords, through which a `$ref` may lead."""
    waiting = list[Any]([root])
    for value in waiting:  # parts are appended
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            for keyword in IDENTIFIERS:
                if isinstance(value.get(keyword), str):
                    del value[keyword]
            for keyword, part in value.items():
                if keyword in SUBSCHEMAS_BY_NAME and isinstance(part, dict):
                    waiting += part.values()
                elif keyword not in DATA:
                    waiting.append(part)
