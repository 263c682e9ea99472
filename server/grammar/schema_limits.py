"""Limits of JSON schemas: refuses by name what llguidance 1.9 compiles slowly or wrongly, or what ends its process.

`python -m bench.fuzz grammars` tries schemas around the limits. Times are those of one CPU core.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from math import lcm
from typing import Any
from urllib.parse import unquote

from server.grammar import GrammarError

# keywords of JSON schema whose values are schemas by name, and those whose values are data
SUBSCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
DATA = ("const", "enum", "default", "examples")
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
ALTERNATIVES = ("anyOf", "oneOf")
# keywords by which a schema may have a `multipleOf`
DIVIDING = ("multipleOf", "$ref", "allOf", *ALTERNATIVES)


def limit_schemas(schemas: Sequence[dict[str, Any]]) -> None:
    """Raise the lower bounds of schemas to `-LARGEST_NUMBER`. Raises `GrammarError` for what exceeds a limit."""
    for schema in schemas:
        _check_reference(schema.get("$ref"))
        _limit_numbers(schema)
        for keyword in CONSTANTS:
            _check_constants(schema.get(keyword))
    _check_multiples(schemas)
    _check_patterns(schemas)


def schemas_of(root: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a schema and all objects in it that a `$ref` may name: those under unknown keywords too, but no data."""
    schemas, waiting = list[dict[str, Any]](), list[Any]([root])
    for value in waiting:  # parts are appended
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            schemas.append(value)
            for keyword, part in value.items():
                if keyword in SUBSCHEMAS_BY_NAME and isinstance(part, dict):
                    waiting += part.values()
                elif keyword not in DATA:
                    waiting.append(part)
    return schemas


def _check_reference(reference: Any) -> None:
    """Raises `GrammarError` if a `$ref` names data, where no limit is checked."""
    steps = iter(unquote(reference).partition("#")[2].split("/")[1:] if isinstance(reference, str) else ())
    for step in steps:
        if step in SUBSCHEMAS_BY_NAME:
            next(steps, None)  # a name
        elif step in DATA:
            raise GrammarError(f"the $ref {reference[:80]!r} names no schema: {step} is data")


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
    """Raises `GrammarError` for a number that llguidance, which computes with 64-bit floats, would write as another one."""
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
    """Return the digits of a number without its zeros at the end: 25 for 0.25 and for 2500; 1 for zero and infinity."""
    digits = Decimal(str(+number)).normalize().as_tuple().digits
    return int("".join(map(str, digits)) or 1) or 1


def _check_patterns(schemas: Sequence[dict[str, Any]]) -> None:
    names = [name for schema in schemas for name in _names(schema.get("patternProperties"))]
    if len(names) > MAX_NAME_PATTERNS:
        raise GrammarError(f"patternProperties has {len(names)} patterns, the limit is {MAX_NAME_PATTERNS}")
    texts = [part for schema in schemas for key in ("pattern", "x-guidance") for part in _parts(schema.get(key))]
    lengths = [len(text) for text in (*names, *texts) if isinstance(text, str)]
    if max(lengths, default=0) > MAX_PATTERN:
        raise GrammarError(f"a pattern has {max(lengths)} characters, the limit is {MAX_PATTERN}")
    if sum(lengths) > MAX_PATTERNS:
        raise GrammarError(f"all patterns have {sum(lengths)} characters, the limit is {MAX_PATTERNS}")


def _names(value: Any) -> Iterable[str]:
    return value if isinstance(value, dict) else ()
