"""Compiles mutated grammars and follows them for a few tokens: JSON schemas and regular expressions.

A grammar must compile or be refused by a `GrammarError`. The library that compiles them is native code, which can end the
process of the worker.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.fuzz.isolated import Try
from bench.fuzz.mutation import mutate, mutate_json
from bench.random_models import folder
from model.config import load_config
from model.prompt import PromptTokenizer
from server.grammar import GrammarError
from server.grammar.compiler import Grammars
from server.grammar.matcher import Matcher
from server.wire import Grammar

MAX_STEPS = 12
MAX_SECONDS = 2.0  # of all threads
EDGES = (*(2**power for power in (31, 53, 63, 64)), 10**18, 9 * 10**18, 10**30, 1, 0)
FORM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20, "pattern": "^[a-z ]+$"},
        "kind": {"enum": ["cat", "dog", 3, None, -5, True]},
        "age": {"type": ["integer", "null"], "minimum": 0, "maximum": 120},
        "size": {"type": "number", "exclusiveMinimum": -1.5, "exclusiveMaximum": 1e6, "multipleOf": 0.25},
        "tags": {"type": "array", "items": {"type": "string", "format": "date-time"}, "minItems": 1, "maxItems": 4},
        "pair": {"type": "array", "prefixItems": [{"const": 1}, {"type": "boolean"}], "items": False},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
        }
    },
    "$ref": "#/$defs/node",
}
RANGE = {"anyOf": [{"type": "integer", "minimum": -5, "maximum": 5}, {"const": 7}, {"allOf": [{"type": "number"}]}]}
JOINED = {
    "allOf": [
        {"type": "object", "properties": {"a": {"type": "integer", "minimum": -5, "maximum": 9}}},
        {"properties": {"b": {"type": "number", "multipleOf": 7}}, "required": ["a", "b"]},
    ]
}
SCHEMAS: tuple[Any, ...] = (FORM, TREE, RANGE, JOINED, {"type": "object", "patternProperties": {"^k[0-9]{1,3}$": {}}})
REGEXES = (b"(ab){3,5}c", rb"[a-z]+\d{2,4}(\.\d+)?", rb"\b\w+@\w+\.(com|org)$", b"(?i)yes|no", "[äöü-ÿ]{1,9}".encode())


PIECES = ("a?", "[a-c]?", "(a|b)*a", r"\w{1,9}", ".*x", "(é|ß)+", "field_")
SHORT = ("(.*[ab]{%d}c.*)", ".*a{%d,}.*b", r"\w*[a-c]\w{%d}x", "(a|b)*a(a|b){%d}")
LIMITS_OF_TEXTS = (("pattern",), ("format",), ("pattern", "format"), ("pattern", "minLength", "maxLength"))
FORMATS = ("date-time", "email", "uri", "uuid", "hostname", "ipv6", "path", "x")


def make() -> Try:
    model = folder("tiny")
    tokenizer = PromptTokenizer.load(model, load_config(model).prompt)
    # the growth of memory is not that of the cache, in which a grammar may take megabytes
    grammars = Grammars(tokenizer, max_compiled=1)

    def attempt(rng: random.Random) -> str | None:
        grammar, began = _grammar(rng), time.process_time()
        failure = _try(grammars, grammar, rng, len(tokenizer))
        # a refusal may take as long as an answer
        return failure or ("a grammar that takes long" if time.process_time() - began > MAX_SECONDS else None)

    return attempt


def _try(grammars: Grammars, grammar: Grammar, rng: random.Random, vocab_size: int) -> str | None:
    """Compile and follow a grammar, and return the name of a failure."""
    try:
        matcher = grammars.compile(grammar).result()
    except GrammarError:
        return None
    except Exception as error:
        return f"{type(error).__name__} instead of a GrammarError: {str(error)[:80]}"
    _follow(matcher.copy(), rng, vocab_size)
    return None


def _grammar(rng: random.Random) -> Grammar:
    if rng.random() < 0.3:
        return Grammar(kind="regex", text=mutate(rng.choice(REGEXES), rng, REGEXES).decode(errors="replace"))
    if rng.random() < 0.2:
        value = rng.choice((_with_patterns, _with_joined_texts, _with_chain))(rng)
        return Grammar(kind="json", text=json.dumps(value))
    schema = _with_edge(rng.choice(SCHEMAS), rng) if rng.random() < 0.7 else rng.choice(SCHEMAS)
    text = mutate_json(schema, rng) if rng.random() < 0.7 else mutate_json({"anyOf": [schema]}, rng)
    return Grammar(kind="json", text=text.decode(errors="replace"))


def _with_patterns(rng: random.Random) -> Any:
    """Return a schema with one or several patterns of texts or names, up to far beyond the limits."""
    lengths = [1] * int(10 ** rng.uniform(1, 3)) if rng.random() < 0.5 else [int(10 ** rng.uniform(2, 4.5))]
    start, piece, end = rng.choice(("", "^")), rng.choice(PIECES), rng.choice(("", "_", "$"))
    patterns = [start + piece * length + f"{i}{end}" for i, length in enumerate(lengths)]
    if rng.random() < 0.5:
        return {"type": "object", "patternProperties": dict.fromkeys(patterns, RANGE)}
    texts = [{"type": "string", "pattern": pattern} for pattern in patterns]
    return {"anyOf": texts} if rng.random() < 0.5 else {"properties": {str(i): text for i, text in enumerate(texts)}}


def _with_joined_texts(rng: random.Random) -> Any:
    """Return a schema in which several patterns, formats and lengths meet in one value or in its parts."""
    shapes, keywords = rng.choice((SHORT[:1], SHORT[1:], SHORT)), rng.choice(LIMITS_OF_TEXTS)
    texts = [_text(rng, shapes, keywords) for _ in range(int(10 ** rng.uniform(0, 1.6)))]
    if rng.random() < 0.3:
        texts = [{"type": "object", "properties": {rng.choice("abc"): text}} for text in texts]
    match rng.randrange(4):
        case 0:
            return {"allOf": texts}
        case 1:
            return {**texts[0], "anyOf": texts[1:3], "allOf": texts[3:]}
        case 2:
            return {"allOf": [{"anyOf": texts[start::3]} for start in range(3)]}
        case _:
            links = {str(i): {"$ref": f"#/$defs/{i + 1}", **text} for i, text in enumerate(texts)}
            return {"$ref": "#/$defs/0", "$defs": {**links, str(len(texts)): {}}}


def _text(rng: random.Random, shapes: Sequence[str], keywords: Sequence[str]) -> dict[str, Any]:
    """Return the schema of a text with some keywords."""
    values = {
        "pattern": rng.choice(shapes) % rng.randrange(1, 30),
        "format": rng.choice(FORMATS),
        "minLength": rng.randrange(50),
        "maxLength": 50 + rng.randrange(2000),
    }
    return {"type": "string"} | {keyword: values[keyword] for keyword in keywords}


def _with_chain(rng: random.Random) -> Any:
    """Return definitions each of which names the next one, up to far more than the stack has room for."""
    length, kinds = int(10 ** rng.uniform(0, 3.4)), rng.choices(range(7), k=rng.randrange(1, 4))
    links = {str(i): _link({"$ref": f"#/$defs/{i + 1}"}, kinds[i % len(kinds)]) for i in range(length)}
    end = {"$ref": f"#/$defs/{rng.randrange(length)}"} if rng.random() < 0.3 else {"type": "string"}
    first = rng.choice((0, length // 2))
    return {"items": {"$ref": f"#/$defs/{first}"}, "$defs": {**links, str(length): end}}


def _link(schema: Any, kind: int) -> Any:
    return (
        schema,
        {"items": schema},
        {"type": "object", "properties": {"a": schema}},
        {"type": "object", "additionalProperties": schema},
        {"anyOf": [schema, {"type": "null"}]},
        {"allOf": [schema]},
        {"minLength": 1, **schema},
    )[kind]


def _with_edge(value: Any, rng: random.Random) -> Any:
    """Return a value in which some numbers are next to an edge, such as that of 64 bits."""
    if isinstance(value, dict):
        return {name: _with_edge(part, rng) for name, part in value.items()}
    if isinstance(value, list):
        return [_with_edge(part, rng) for part in value]
    if isinstance(value, bool) or not isinstance(value, int | float) or rng.random() < 0.5:
        return value
    number = rng.choice((-1, 1)) * rng.choice(EDGES) + rng.randrange(-9, 10)
    return number if rng.random() < 0.7 else float(number)


def _follow(matcher: Matcher, rng: random.Random, vocab_size: int) -> None:
    for _ in range(MAX_STEPS):
        allowed = np.flatnonzero(matcher.allowed(vocab_size, ends=rng.random() < 0.2))
        if not len(allowed) or matcher.is_complete:
            return
        matcher.accept(int(rng.choice(allowed)))
