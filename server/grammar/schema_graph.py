"""The graph of the schemas that describe a value: a JSON schema, the schemas in it, and those that a `$ref` names.

Nothing else in a JSON schema is compiled: neither definitions without a `$ref`, nor the values of unknown keywords.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from server.grammar import GrammarError

T = TypeVar("T")
# the way to a schema from the one that it is in: a keyword, in some with a name or an index
Steps = tuple[str, ...]
# keywords whose schemas all describe the value of the schema that has them, or one of which does
JOINED = ("allOf", "$ref")
ALTERNATIVES = ("anyOf", "oneOf")
# keywords whose schemas describe the parts of the value
PARTS = ("items", "prefixItems", "additionalItems", "additionalProperties")
PARTS_BY_NAME = ("properties", "patternProperties")
# keywords whose values are schemas by name, and those whose values are data
SUBSCHEMAS_BY_NAME = (*PARTS_BY_NAME, "$defs", "definitions")
DATA = ("const", "enum", "default", "examples")
MAX_SHOWN = 80


@dataclass(slots=True, eq=False)
class Node:
    """A schema, its path, and the nodes under its keywords: the step to each is a keyword, with a name or an index."""

    schema: dict[str, Any]
    steps: Steps = ()
    parent: Node | None = None
    children: list[tuple[Steps, Node]] = field(default_factory=list)

    @property
    def pointer(self) -> str:
        """The JSON pointer to the schema."""
        steps, node = list[str](), self
        while node.parent is not None:
            steps[:0] = node.steps
            node = node.parent
        return "/".join(("#", *node.steps, *map(escaped, steps)))

    @property
    def path(self) -> str:
        """The path as a message shows it."""
        pointer = unquote(self.pointer)
        if len(pointer) > MAX_SHOWN:
            return f"…{pointer[1 - MAX_SHOWN :]}"
        return "the schema" if pointer == "#" else pointer


def escaped(step: str) -> str:
    """Return a step as a JSON pointer writes it."""
    return quote(step.replace("~", "~0").replace("/", "~1"))


def nodes_of(root: dict[str, Any], prepare: Callable[[Node, dict[str, Any]], None]) -> list[Node]:
    """Return the nodes that a schema reaches; the first is its own. Raises `GrammarError` for a `$ref` to no schema.

    `prepare` may change each schema, of which the root is an argument too, before its own parts are read.
    """
    waiting = [Node(root)]
    nodes = {id(root): waiting[0]}
    for node in waiting:  # children are appended
        prepare(node, root)
        for steps, part in _parts(node.schema):
            schema = target(root, part) if steps == ("$ref",) else part
            if not isinstance(schema, dict):
                continue
            if (child := nodes.get(id(schema))) is None:
                child = Node(schema, tuple(part.split("/")[1:])) if schema is not part else Node(schema, steps, node)
                nodes[id(schema)] = child
                waiting.append(child)
            node.children.append((steps, child))
    return waiting


def _parts(schema: dict[str, Any]) -> Iterator[tuple[Steps, Any]]:
    """Yield the values that the keywords of a schema use as schemas, or name, with the steps to each."""
    for keyword, value in schema.items():
        if keyword in PARTS_BY_NAME and isinstance(value, dict):
            yield from (((keyword, name), part) for name, part in value.items())
        elif keyword in (*JOINED, *ALTERNATIVES, *PARTS) and isinstance(value, list):
            yield from (((keyword, str(index)), part) for index, part in enumerate(value))
        elif keyword in (*JOINED, *ALTERNATIVES, *PARTS):
            yield (keyword,), value


def target(root: dict[str, Any], reference: Any) -> Any:
    """Return what a `$ref` names. Raises `GrammarError` unless it is a JSON pointer to a schema."""
    name = repr(reference)[:MAX_SHOWN]
    if not isinstance(reference, str) or not f"{reference}/".startswith("#/"):
        raise GrammarError(f"the $ref {name} is not supported: use a JSON pointer such as '#/$defs/name'")
    value, is_schema = root, True
    for part in unquote(reference).split("/")[1:]:
        step = part.replace("~1", "/").replace("~0", "~")
        if is_schema and step in DATA:
            raise GrammarError(f"the $ref {name} names no schema: {step} is data")
        is_schema = not (is_schema and step in SUBSCHEMAS_BY_NAME)
        value = _child(value, step)
    if not is_schema or not isinstance(value, dict | bool):
        raise GrammarError(f"the $ref {name} names no schema")
    return value


def _child(value: Any, step: str) -> Any:
    """Return a part of a JSON value, None if it has no such part."""
    if isinstance(value, list):
        is_index = step.isdecimal() and len(step) < 9 and str(int(step)) == step and int(step) < len(value)
        return value[int(step)] if is_index else None
    return value.get(step) if isinstance(value, dict) else None


def measured(root: Node, measure: Callable[[Node, Sequence[tuple[Steps, T]]], T], start: T) -> T:
    """Return a measure of a node, which is computed from those of its children. Within a cycle, a node measures `start`."""
    values, begun, waiting = dict[Node, T](), set[Node](), [root]
    while waiting:
        node = waiting[-1]
        if node in begun:
            waiting.pop()
            if node not in values:
                values[node] = measure(node, [(steps, values.get(child, start)) for steps, child in node.children])
        else:
            begun.add(node)
            # in the order in which llguidance follows them, so that a cycle is cut where it ends its own recursion
            waiting += reversed([child for _, child in node.children if child not in begun])
    return values[root]
