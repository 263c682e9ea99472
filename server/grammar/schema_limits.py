"""Limits of JSON schemas: refuses by name what llguidance 1.9 compiles slowly or wrongly, or what ends its process.

`python -m bench.fuzz grammars` tries schemas around the limits. Times are those of one CPU core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from functools import partial, reduce
from math import lcm
from operator import add
from typing import Any

from server.grammar import GrammarError
from server.grammar.schema_graph import ALTERNATIVES, DATA, JOINED, Node, Steps, measured

CONSTANTS = ("const", "enum")
LOWER_BOUNDS = ("minimum", "exclusiveMinimum")
# limit of numbers: llguidance ends the process for an integer next to -2**63
LARGEST_NUMBER = 9 * 10**18
# limit of the sum of all `multipleOf`, or of their common multiple where a value may have to match several of them: each
# remainder of a number is a state of its grammar, and a million of them take 20 seconds and half a gigabyte
MAX_MULTIPLE = 10_000
# limits of the characters of one pattern and of all patterns: the time and the memory of a pattern are quadratic, and
# 60,000 characters take 10 seconds and 2 gigabytes
MAX_PATTERN = 2_048
MAX_PATTERNS = 8 * MAX_PATTERN
# limit of patterns of names: each pair is compared, and 400 of them take 20 seconds
MAX_NAME_PATTERNS = 64
# limit of the patterns and formats that one value may have to match: 10 take 50 milliseconds, 14 take 8 seconds
MAX_JOINED_PATTERNS = 6
# limit of the longest path of schemas, each of which is in the one before or is named by its `$ref`: from about 1,650 on,
# llguidance overflows the 8 MiB of a stack
MAX_DEPTH = 250
# limit of the repetitions in a regular expression: the time is quadratic, and 3,000 of `\\w?` take 4 seconds
MAX_REPETITIONS = 1_000
REPETITIONS = "?*+{"
# the numbers of patterns that a value has to match, and its parts, by name or together as `PARTS`
Patterns = tuple[int, dict[Steps, int]]
PARTS: Steps = ("",)
# keywords by which a schema may have a `multipleOf`
DIVIDING = ("multipleOf", "$ref", "allOf", *ALTERNATIVES)


def limit_schemas(nodes: Sequence[Node]) -> None:
    """Raise the lower bounds of schemas to `-LARGEST_NUMBER`. Raises `GrammarError` for what exceeds a limit."""
    if (depth := measured(nodes[0], _depth, 0)) > MAX_DEPTH:
        raise GrammarError(
            f"the schemas, each in another one or named by its $ref, have a depth of {depth}, the limit is {MAX_DEPTH}"
        )
    schemas = [node.schema for node in nodes]
    for schema in schemas:
        _limit_numbers(schema)
        for keyword in CONSTANTS:
            _check_constants(schema.get(keyword))
    _check_multiples(schemas)
    _check_patterns(schemas)
    if sum(map(_num_patterns, schemas)) > MAX_JOINED_PATTERNS:
        measured(nodes[0], _joined_patterns, (0, {PARTS: 0}))


def check_regex(text: str) -> None:
    """Check that a regular expression has few repetitions, which take long to compile. Raises `GrammarError`."""
    if (number := sum(map(text.count, REPETITIONS))) > MAX_REPETITIONS:
        raise GrammarError(f"the regular expression has {number} repetitions, the limit is {MAX_REPETITIONS}")


def _depth(node: Node, children: Sequence[tuple[Steps, int]]) -> int:
    return 1 + max((depth for _, depth in children), default=0)


def _num_patterns(schema: dict[str, Any]) -> int:
    return ("pattern" in schema) + ("format" in schema)


def _joined_patterns(node: Node, children: Sequence[tuple[Steps, Patterns]]) -> Patterns:
    """Return the numbers of patterns that the value of a schema and its parts have to match.

    Raises `GrammarError` for a number above the limit.
    """
    names = {steps: most for steps, patterns in children if steps[0] == "properties" and (most := _most(patterns))}
    named = (*JOINED, *ALTERNATIVES, "properties")
    nameless = max((_most(patterns) for steps, patterns in children if steps[0] not in named), default=0)
    result = _num_patterns(node.schema), {PARTS: nameless, **names}
    for keyword in JOINED:
        for steps, patterns in children:
            result = _merged(add, result, patterns) if steps[0] == keyword else result
    for keyword in ALTERNATIVES:
        options = [patterns for steps, patterns in children if steps[0] == keyword]
        result = _merged(add, result, reduce(partial(_merged, max), options)) if options else result
    if (number := _most(result)) > MAX_JOINED_PATTERNS:
        raise GrammarError(
            f"{node.path}: a value may have to match {number} patterns and formats, by allOf or $ref or next to anyOf or "
            f"oneOf, the limit is {MAX_JOINED_PATTERNS}"
        )
    return result


def _most(patterns: Patterns) -> int:
    value, parts = patterns
    return max(value, *parts.values())


def _merged(operation: Callable[[int, int], int], first: Patterns, second: Patterns) -> Patterns:
    """Return the numbers of two schemas for one value. A part without a name in one of them is one of its `PARTS`."""
    (value, parts), (other_value, other_parts) = first, second
    if not any(parts.values()) or (operation is max and parts is other_parts):
        merged = other_parts  # as they are: many `$ref` to one schema take no copies
    elif not any(other_parts.values()):
        merged = parts
    else:
        names = parts | other_parts
        merged = {
            name: operation(parts.get(name, parts[PARTS]), other_parts.get(name, other_parts[PARTS])) for name in names
        }
    return operation(value, other_value), merged


def _limit_numbers(schema: dict[str, Any]) -> None:
    for keyword, number in schema.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or keyword in DATA:
            continue
        if keyword in LOWER_BOUNDS and number > LARGEST_NUMBER:
            raise GrammarError(f"{keyword} is at most {LARGEST_NUMBER}, not {_shown(number)}")
        if number < -LARGEST_NUMBER:
            if keyword not in LOWER_BOUNDS:
                raise GrammarError(f"{keyword} is at least {-LARGEST_NUMBER}, not {_shown(number)}")
            schema[keyword] = -LARGEST_NUMBER


def _check_constants(constants: Any) -> None:
    """Check that numbers are exact as 64-bit floats, with which llguidance computes. Raises `GrammarError`."""
    for value in _parts(constants):
        if isinstance(value, int | float) and value < -LARGEST_NUMBER:
            raise GrammarError(f"a number of a constant is at least {-LARGEST_NUMBER}, not {_shown(value)}")
        if isinstance(value, int) and not _is_exact(value):
            raise GrammarError(f"the number {_shown(value)} of a constant is not exact as a 64-bit float: use a string")


def _is_exact(number: int) -> bool:
    """Return whether llguidance writes an integer as it is: exactly below 2**63, and from there on its first digits."""
    if number >= 2**63 - 1:
        return number == 2**63 - 1 or (number < 1e300 and int(Decimal(repr(float(number)))) == number)
    return int(float(number)) == number


def _shown(number: float) -> str:
    """Return a number as a text that is not long: Python refuses to print very long integers."""
    return str(number)[:40] if abs(number) < 1e300 else "a larger one"


def _parts(root: Any) -> Iterator[Any]:
    """Yield a JSON value and all of its parts."""
    waiting = [root]
    for value in waiting:
        yield value
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _check_multiples(schemas: Sequence[dict[str, Any]]) -> None:
    multiples = [schema.get("multipleOf") for schema in schemas]
    numbers = [_significant(number) for number in multiples if isinstance(number, int | float)]
    if any(map(_is_joined, schemas)) and lcm(*numbers) > MAX_MULTIPLE:
        raise GrammarError(
            f"the common multiple of all multipleOf, apart from powers of ten, is above {MAX_MULTIPLE}, the limit"
        )
    if sum(numbers) > MAX_MULTIPLE:
        raise GrammarError(f"the sum of all multipleOf, apart from powers of ten, is above {MAX_MULTIPLE}, the limit")


def _is_joined(schema: dict[str, Any]) -> bool:
    """Return whether several `multipleOf` may apply to one value, together or as alternatives."""
    lists = [parts for keyword in ALTERNATIVES if isinstance(parts := schema.get(keyword), list)]
    is_shared = "allOf" in schema or "patternProperties" in schema or _num_dividing(schema) > 1
    return is_shared or any(sum(_num_dividing(part) > 0 for part in parts) > 1 for parts in lists)


def _num_dividing(schema: Any) -> int:
    return sum(keyword in schema for keyword in DIVIDING) if isinstance(schema, dict) else 0


def _significant(number: float) -> int:
    """Return the digits of a number without its zeros at the end: 25 for 0.25 and for 2500; 1 for zero."""
    digits = Decimal(str(+number)).normalize().as_tuple().digits
    return int("".join(map(str, digits)) or 1) or 1


def _check_patterns(schemas: Sequence[dict[str, Any]]) -> None:
    names = [name for schema in schemas for name in _names(schema.get("patternProperties"))]
    if len(names) > MAX_NAME_PATTERNS:
        raise GrammarError(f"patternProperties has {len(names)} patterns, the limit is {MAX_NAME_PATTERNS}")
    texts = [schema.get("pattern") for schema in schemas]
    lengths = [len(text) for text in (*names, *texts) if isinstance(text, str)]
    if max(lengths, default=0) > MAX_PATTERN:
        raise GrammarError(f"a pattern has {max(lengths)} characters, the limit is {MAX_PATTERN}")
    if sum(lengths) > MAX_PATTERNS:
        raise GrammarError(f"all patterns have {sum(lengths)} characters, the limit is {MAX_PATTERNS}")


def _names(value: Any) -> Iterable[str]:
    return value if isinstance(value, dict) else ()
