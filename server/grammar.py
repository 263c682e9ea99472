"""Constrains answers to a choice of strings, a regular expression or a JSON schema, by llguidance.

A grammar is compiled once, in a thread, and copied for each answer. Its size and llguidance's counters of work are limited,
but not the time, so that every machine accepts the same grammars. This module does not import torch.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from heapq import heappop, heappush
from itertools import count
from math import lcm
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from model.prompt import PromptTokenizer
from server.wire import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# with this limit, compiling takes at most half a second: its time is quadratic for some grammars
MAX_BYTES = 1 << 17
MAX_SYMBOLS = 20_000
# limit per answer; each takes one or two kB
MAX_STATES = 20_000
MAX_COMPILED = 32
# messages do not repeat the client's grammar, and have a length that fits a log line
LIMITS = LLParserLimits(max_grammar_size=MAX_SYMBOLS, max_lexer_states=MAX_STATES, verbose_errors=False)
MAX_MESSAGE = 200
# no spaces between JSON tokens: a small model may write spaces and line breaks endlessly
COMPACT: JsonCompileOptions = {"whitespace_flexible": False}
# bound of integers: llguidance reads bounds as 64-bit floats, which represent this one exactly
LARGEST_INTEGER = 10**18
# limit of numbers in a schema: llguidance 1.9 ends the process for an integer next to -2**63
LARGEST_NUMBER = 9 * 10**18
# limit of the common multiple of all `multipleOf`, apart from powers of ten: each remainder of a number is a state of its
# grammar, and a million of them take 20 seconds and half a gigabyte
MAX_MULTIPLE = 10_000
# limit of bounded integers, which take much more of a grammar than unbounded ones
MAX_BOUNDED = 100
LOWER_BOUNDS = ("minimum", "exclusiveMinimum")
UPPER_BOUNDS = ("maximum", "exclusiveMaximum")
# keywords of JSON schema whose values are schemas, by the kind of value
SUBSCHEMA = ("items", "additionalProperties")
ALTERNATIVES = ("anyOf", "oneOf")
LIST_OF_SUBSCHEMAS = ("prefixItems", "allOf", *ALTERNATIVES)
SUBSCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")

# characters that end a part of a JSON text
ENDS_OF_PARTS = (b'"', b"}", b"]", b",")
# estimated tokens for the punctuation of a property, and for the parts that may be open when an answer has to end
PROPERTY_TOKENS = 3
OPEN_TOKENS = 8

logger = logging.getLogger(__name__)


class GrammarError(ValueError):
    """A grammar that cannot be used; the message is for the client."""


def check(grammar: Grammar) -> None:
    """Check that a grammar is neither empty nor too large; compilation checks the rest. Raises `GrammarError`."""
    if grammar.kind == "choice" and not (grammar.choices and all(grammar.choices)):
        raise GrammarError("choice must have at least one string and no empty string")
    if (size := num_bytes(grammar)) > MAX_BYTES:
        raise GrammarError(f"{grammar.kind} has {size} bytes, the limit is {MAX_BYTES}")


def num_bytes(grammar: Grammar) -> int:
    return sum(len(text.encode()) for text in (*grammar.choices, grammar.text))


def source(grammar: Grammar) -> str:
    """Return the grammar in llguidance's own language. Raises `GrammarError`."""
    match grammar.kind:
        case "choice":
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, grammar.choices)))
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "json":
            schema = _closed(grammar.text)
            try:
                return LLMatcher.grammar_from_json_schema(schema, defaults=COMPACT)
            except ValueError as error:
                raise GrammarError(f"not a JSON schema: {error}") from None


def _closed(text: str) -> str:
    """Return a JSON schema whose objects have only the named properties, and whose integers fit 64 bits.

    Otherwise a model may invent properties or digits endlessly. Existing keywords about either stay, and integers of a
    schema with very many stay unbounded. Raises `GrammarError` for a text that is not JSON, and for numbers that the
    library cannot compile.
    """
    schemas = _schemas(text)
    if not schemas:
        return text
    _limit_numbers(schemas[0])
    _limit_multiples(schemas[0])
    # several parts of one object would forbid the properties of each other
    if not any(_num_parts(schema) > 1 for schema in schemas):
        _close(schemas)
    return json.dumps(schemas[0])


def _close(schemas: Sequence[dict[str, Any]]) -> None:
    for schema in schemas:
        if "properties" in schema:
            schema.setdefault("additionalProperties", "patternProperties" in schema)
    integers = [schema for schema in schemas if _is_integer(schema.get("type"))]
    for schema in integers if len(integers) <= MAX_BOUNDED else ():
        _bound(schema)


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
    """Add the bounds of an integer that the schema lacks; constants have none, and far ones go with its own far bounds."""
    if "enum" in schema or "const" in schema:
        return
    bounds = [schema[name] for name in LOWER_BOUNDS + UPPER_BOUNDS if name in schema]
    is_large = any(isinstance(bound, int | float) and abs(bound) >= LARGEST_INTEGER for bound in bounds)
    largest = LARGEST_NUMBER if is_large else LARGEST_INTEGER
    for names, bound in ((LOWER_BOUNDS, -largest), (UPPER_BOUNDS, largest)):
        if not any(name in schema for name in names):
            schema[names[0]] = bound


def _limit_numbers(schema: dict[str, Any]) -> None:
    """Raise lower bounds to `-LARGEST_NUMBER`. Raises `GrammarError` if any other number is below it."""
    for value in _values(schema):
        if isinstance(value, dict):
            for name in LOWER_BOUNDS:
                if _is_below(value.get(name)):
                    value[name] = -LARGEST_NUMBER
        elif _is_below(value):
            raise GrammarError(f"a number of a schema is at least {-LARGEST_NUMBER}, not {str(value)[:40]}")


def _limit_multiples(schema: dict[str, Any]) -> None:
    """Raises `GrammarError` if the common multiple of all `multipleOf` is too large; subschemas may be joined."""
    numbers = [value.get("multipleOf") for value in _values(schema) if isinstance(value, dict)]
    if lcm(*(_significant(number) for number in numbers if isinstance(number, int | float))) > MAX_MULTIPLE:
        raise GrammarError(
            f"the common multiple of all multipleOf, apart from powers of ten, is above {MAX_MULTIPLE}, the limit"
        )


def _significant(number: float) -> int:
    """Return the digits of a number without its zeros at the end: 25 for 0.25 and for 2500; 1 for zero and infinity."""
    digits = Decimal(str(+number)).normalize().as_tuple().digits
    return int("".join(map(str, digits)) or 1) or 1


def _values(root: Any) -> Iterator[Any]:
    """Yield a JSON value and all of its parts, each after the value that it is a part of."""
    waiting = [root]
    for value in waiting:
        yield value
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _is_below(value: Any) -> bool:
    return isinstance(value, int | float) and value < -LARGEST_NUMBER


def _words(text: str) -> list[Any]:
    """Return the texts that an answer may have to write before its end: the properties' names and the longest constants."""
    words: list[Any] = []
    for schema in _schemas(text):
        if isinstance(properties := schema.get("properties"), dict):
            words += properties
        if isinstance(constants := schema.get("enum"), list) and constants:
            words.append(max(constants, key=lambda constant: len(json.dumps(constant))))
        words += [schema["const"]] if "const" in schema else []
    return words


def _schemas(text: str) -> list[dict[str, Any]]:
    """Return a JSON schema and all of its subschemas; an empty list for JSON that is not an object.

    Raises `GrammarError` for a text that is not JSON, or is nested too deeply.
    """
    try:
        schemas = [json.loads(text)]
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"not a JSON schema: {error}") from None
    for schema in schemas:  # subschemas are appended
        if isinstance(schema, dict):
            schemas += _subschemas(schema)
    return [schema for schema in schemas if isinstance(schema, dict)] if isinstance(schemas[0], dict) else []


def _subschemas(schema: dict[str, Any]) -> Iterator[Any]:
    for keyword in SUBSCHEMA:
        yield schema.get(keyword)
    for keyword in LIST_OF_SUBSCHEMAS:
        if isinstance(values := schema.get(keyword), list):
            yield from values
    for keyword in SUBSCHEMAS_BY_NAME:
        if isinstance(values := schema.get(keyword), dict):
            yield from values.values()


class Grammars:
    """Compiles grammars for one tokenizer in a dedicated thread, the smallest first, and caches the last used ones."""

    def __init__(self, tokenizer: PromptTokenizer) -> None:
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._compiled: OrderedDict[tuple[bytes, Grammar], Future[Matcher]] = OrderedDict()
        self._waiting: list[tuple[int, int, Grammar, Future[Matcher]]] = []
        self._numbers = count()

    @cached_property
    def _table(self) -> LLTokenizer:
        """The table of tokens. Building it holds the interpreter's lock, unlike compiling a grammar."""
        return LLTokenizer(self._tokenizer.to_json(), eos_token=list(self._tokenizer.eos_ids))

    def compile(self, grammar: Grammar, salt: bytes = b"") -> Future[Matcher]:
        """Return the state at the grammar's beginning, to be copied for each answer, or its `GrammarError`.

        Prompts with different salts share no compiled grammar.
        """
        key = salt, grammar
        if key not in self._compiled:
            compiling = self._compiled[key] = Future[Matcher]()
            heappush(self._waiting, (num_bytes(grammar), next(self._numbers), grammar, compiling))
            self._thread.submit(self._compile_smallest)
        self._compiled.move_to_end(key)
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return self._compiled[key]

    def _compile_smallest(self) -> None:
        _, _, grammar, compiling = heappop(self._waiting)
        try:
            compiling.set_result(self._matcher(grammar))
        except GrammarError as error:
            compiling.set_exception(error)
        except BaseException:  # a panic of llguidance is not an Exception; a request must not wait for ever
            logger.exception("a grammar could not be compiled")
            compiling.set_exception(GrammarError(f"this {grammar.kind} cannot be compiled"))

    def _matcher(self, grammar: Grammar) -> Matcher:
        check(grammar)
        state = LLMatcher(self._table, source(grammar), log_level=0, limits=LIMITS)
        matcher = Matcher(state, self._ending(grammar))
        if not matcher.error:
            matcher.allowed(0)  # the slowest mask: copies reuse its computed states
        if matcher.error:
            raise GrammarError(matcher.error)
        return matcher

    def _ending(self, grammar: Grammar) -> Ending | None:
        """Return how an answer in JSON is ended; other grammars have no unbounded parts that could be cut, so None."""
        if grammar.kind != "json":
            return None
        ends = [self._table.tokenize_bytes(end) for end in ENDS_OF_PARTS]
        if any(len(end) != 1 for end in ends):
            return None
        quote, brace, bracket, comma = (token_id for (token_id,) in ends)
        words = _words(grammar.text)
        num_tokens = len(self._tokenizer.encode_plain(json.dumps(words))) + PROPERTY_TOKENS * len(words) + OPEN_TOKENS
        eos = self._tokenizer.eos_ids
        return Ending(num_tokens=num_tokens, eos=eos, quote=quote, brace=brace, bracket=bracket, comma=comma)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The end of an answer in JSON: the estimated number of its tokens, and the tokens that end a part."""

    num_tokens: int
    eos: tuple[int, ...]
    quote: int
    brace: int
    bracket: int
    comma: int

    def next(self, allowed: np.ndarray) -> int | None:
        """Return the token, of those allowed [V], that ends the most; None if none of them ends a part."""
        # outside a string only one of the two brackets may follow: the one that ends the open part
        is_in_string = allowed[self.brace] and allowed[self.bracket]
        order = (self.quote,) if is_in_string else (*self.eos, self.brace, self.bracket, self.quote, self.comma)
        return next((token_id for token_id in order if allowed[token_id]), None)


class Matcher:
    """The state of one answer in its grammar. `ending` is None if the answer is never ended early."""

    def __init__(self, matcher: LLMatcher, ending: Ending | None = None) -> None:
        self._matcher = matcher
        self._ending = ending

    def copy(self) -> Matcher:
        return Matcher(self._matcher.deep_copy(), self._ending)

    def must_end(self, num_left: int, max_tokens: int) -> bool:
        """Return whether an answer with `num_left` of its `max_tokens` left has to end now, to be complete.

        It never has to end before half of its tokens are used, however long its end is.
        """
        return self._ending is not None and num_left <= min(self._ending.num_tokens, max_tokens // 2)

    @property
    def error(self) -> str:
        """Why the grammar cannot be followed any further, "" if it can."""
        return _summary(self._matcher.get_error())

    @property
    def is_complete(self) -> bool:
        """True if only the end of the answer may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self, vocab_size: int, *, ends: bool = False) -> np.ndarray:
        """Return bool [V]: the tokens that may come next, none after an error.

        With `ends`, if a token may come that ends a part of the answer, only that one is allowed.
        """
        mask = np.zeros(vocab_size, dtype=bool)
        if not self._matcher.is_error():
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            allowed = np.unpackbits(bits, bitorder="little")[:vocab_size].astype(bool)
            mask[: len(allowed)] = allowed
        if ends and self._ending is not None and (end := self._ending.next(mask)) is not None:
            mask[:] = False
            mask[end] = True
        return mask

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)


def _summary(message: str) -> str:
    """Return the first line or, for a regular expression, the reason: the lines above it repeat the changed expression."""
    lines = message.splitlines()
    reasons = [line.removeprefix("error: ")[:MAX_MESSAGE] for line in lines if line.startswith("error: ")]
    return f"invalid regular expression: {reasons[0]}" if reasons else "".join(lines[:1])[:MAX_MESSAGE]
