"""Schemas as libraries write them, of which llguidance alone would permit answers that do not conform to them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import jsonschema
import numpy as np
import pytest
from pydantic import BaseModel, Field

from server.grammar.compiler import Grammars
from tests.server.grammar.test_compiler import TOKENIZER, VOCAB_SIZE, is_permitted, schema


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    name: str


class Owner(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


def samples(value: dict[str, Any], count: int = 30, num_tokens: int = 60) -> list[str]:
    """Return the complete ones of some answers of random tokens, which are brought to their end after some of them."""
    compiled, texts = Grammars(TOKENIZER).compile(schema(value)).result(), list[str]()
    for seed in range(count):
        matcher, rng, token_ids = compiled.copy(), np.random.default_rng(seed), list[int]()
        while not matcher.is_complete and len(token_ids) < 200:
            allowed = matcher.allowed(VOCAB_SIZE, ends=len(token_ids) > num_tokens)
            token_ids.append(int(rng.choice(np.flatnonzero(allowed))))
            if token_ids[-1] in TOKENIZER.eos_ids:
                break
            matcher.accept(token_ids[-1])
        else:
            if not matcher.is_complete:
                continue
        texts.append(TOKENIZER.decode(token_ids))
    return texts


def test_alternatives_of_pydantic_have_their_discriminator() -> None:
    for text in samples(Owner.model_json_schema()):
        Owner.model_validate_json(text)


CAT = {"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}}}
DOG = {"type": "object", "properties": {"kind": {"const": "dog"}, "name": {"type": "string"}}, "required": ["name"]}


@pytest.mark.parametrize("keyword", ["anyOf", "oneOf"])
def test_the_property_that_a_discriminator_names_is_required(keyword: str) -> None:
    value = {keyword: [CAT, {"$ref": "#/$defs/dog"}], "$defs": {"dog": DOG}, "discriminator": {"propertyName": "kind"}}
    assert is_permitted(schema(value), '{"kind":"dog","name":"a"}')
    assert not is_permitted(schema(value), '{"name"')
    assert not is_permitted(schema(value), "{}")


def test_a_constant_by_which_all_parts_of_a_one_of_differ_is_required() -> None:
    assert is_permitted(schema({"oneOf": [CAT, DOG]}), '{"kind":"cat"}')
    assert not is_permitted(schema({"oneOf": [CAT, DOG]}), "{}")
    assert is_permitted(schema({"anyOf": [CAT, DOG]}), "{}")


@pytest.mark.parametrize(
    "pattern",
    [
        '^[^"]+$',
        r"^[^\\]+$",
        r'^[^"\n]+$',
        r'^[^]"]+$',
        r'^[^-"]+$',
        r'^[^"-]+$',
        r'^[a-z\[^"]+[^\]"]$',
        r'^([^"\\]|x)+$',
    ],
)
def test_a_negated_class_excludes_quotes_and_backslashes(pattern: str) -> None:
    for value in (
        {"type": "string", "pattern": pattern},
        {"type": "object", "patternProperties": {pattern: {"type": "null"}}, "additionalProperties": False},
        {"type": "object", "propertyNames": {"pattern": pattern}, "additionalProperties": {"type": "null"}},
    ):
        for text in samples(value, 12, 20):
            jsonschema.validate(json.loads(text), value)


def test_a_negated_class_excludes_what_it_names() -> None:
    def permitted(pattern: str, value: str) -> bool:
        return is_permitted(schema({"type": "string", "pattern": pattern}), json.dumps(value))

    for pattern, excluded in [('^[^"]+$', '"'), (r"^[^\\]+$", "\\"), (r'^[^]"]+$', '"]'), (r'^[^-"]+$', '"-')]:
        assert permitted(pattern, "a b~")
        assert not any(permitted(pattern, f"a{character}") for character in excluded)
