"""Matchers: which tokens may follow in a long text without an alternative, and how long all tokens may take."""

from __future__ import annotations

import json
import random
import time

import numpy as np
import pytest
from llguidance import LLParserLimits

from server.grammar import compiler
from server.grammar import matcher as matcher_module
from server.grammar.compiler import Grammars
from server.grammar.matcher import RUN_BYTES, TOO_SLOW, Matcher
from server.wire import Grammar
from tests.tiny_models import prompt_tokenizer

TOKENIZER = prompt_tokenizer()
VOCAB_SIZE = 300
LONG = "the bird stands. " * 60
assert len(LONG) > RUN_BYTES
NAMES = [f"p{i}" for i in range(3000)]


def regex(text: str) -> Grammar:
    return Grammar(kind="regex", text=text)


def schema(value: object) -> Grammar:
    return Grammar(kind="json", text=json.dumps(value))


def compiled(grammar: Grammar) -> Matcher:
    return Grammars(TOKENIZER).compile(grammar).result().copy()


def allowed(matcher: Matcher) -> list[int]:
    return np.flatnonzero(matcher.allowed(VOCAB_SIZE)).tolist()


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (schema({"const": LONG}), json.dumps(LONG)),
        (schema({"enum": [f"{letter}{LONG}" for letter in "ab"]}), json.dumps(f"b{LONG}")),
        (regex(f"[0-9]a{{{2 * RUN_BYTES}}}[bé]?"), "7" + "a" * 2 * RUN_BYTES + "é"),
        (schema({"const": "xé" * RUN_BYTES + "\n"}), json.dumps("xé" * RUN_BYTES + "\n", ensure_ascii=False)),
    ],
)
def test_a_long_text_without_an_alternative_is_permitted(grammar: Grammar, text: str) -> None:
    matcher = compiled(grammar)
    for token_id in TOKENIZER.encode_plain(text):
        assert token_id in allowed(matcher)
        matcher.accept(token_id)
    assert matcher.is_complete


def test_after_a_long_text_all_alternatives_are_permitted() -> None:
    matcher, other = compiled(regex("a" * 2 * RUN_BYTES + "[bc]")), TOKENIZER.encode_plain("b")[0]
    (a,) = TOKENIZER.encode_plain("a")
    for _ in range(2 * RUN_BYTES):
        assert allowed(matcher) == [a]
        matcher.accept(a)
    assert other in allowed(matcher)
    assert len(allowed(matcher)) == 2


def test_copies_of_a_matcher_in_a_long_text_are_followed_alone() -> None:
    matcher = compiled(regex("[xy]" + "abc" * RUN_BYTES))
    x, a, b, c = (TOKENIZER.encode_plain(letter)[0] for letter in "xabc")
    matcher.accept(x)
    assert allowed(matcher) == [a]
    copied = matcher.copy()
    copied.accept(a)
    assert (allowed(copied), allowed(matcher)) == ([b], [a])
    copied.accept(b)
    assert (allowed(copied), allowed(matcher)) == ([c], [a])


def test_another_token_in_a_long_text_is_an_error() -> None:
    matcher = compiled(regex("a" * 2 * RUN_BYTES))
    assert len(allowed(matcher)) == 1
    matcher.accept(TOKENIZER.encode_plain("b")[0])
    assert matcher.error
    assert not allowed(matcher)


@pytest.mark.parametrize(
    "grammar",
    [
        schema({"const": "a" * 90_000}),
        schema({"const": [1] * 9000}),
        regex("a{60000}"),
        schema({"type": "object", "properties": {name: {"const": 1} for name in NAMES}, "required": NAMES}),
    ],
)
def test_each_token_of_a_long_text_takes_little_time(grammar: Grammar) -> None:
    matcher = compiled(grammar)
    began = time.thread_time()
    for _ in range(200):
        matcher.accept(allowed(matcher)[0])
    assert time.thread_time() - began < 0.25


def test_the_tokens_of_one_request_share_a_limit_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.grammar.matcher.TOKEN_SECONDS", 0.0)
    monkeypatch.setattr("server.grammar.matcher.REQUEST_SECONDS", 1e-9)
    matcher = compiled(regex("[a-z]+"))
    (first, second), (other,) = matcher.copies(2), matcher.copies(1)
    assert len(allowed(first)) > 1
    assert (first.error, second.error, other.error) == (TOO_SLOW, TOO_SLOW, "")
    assert (len(allowed(second)), first.is_complete, second.is_complete) == (0, False, False)


COUNTED = regex("[ab]*a[ab]{12}")


def follow(matcher: Matcher, seed: int) -> bool:
    """Follow a random answer, and return whether tokens were permitted to its end."""
    chosen = random.Random(seed)
    for _ in range(60):
        if not (permitted := set(allowed(matcher)) - {*TOKENIZER.eos_ids}):
            return False
        matcher.accept(chosen.choice(sorted(permitted)))
    return True


@pytest.fixture
def few_states(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = LLParserLimits(max_lexer_states=400, verbose_errors=False)
    monkeypatch.setattr(compiler, "LIMITS", limits)


@pytest.mark.usefixtures("few_states")
def test_answers_do_not_use_up_the_states_of_later_ones() -> None:
    first = Grammars(TOKENIZER).compile(COUNTED).result()
    assert all(follow(first.copy(), seed) for seed in range(40))
    assert first._beginning.number > 1


@pytest.mark.usefixtures("few_states")
def test_an_answer_goes_on_although_others_have_used_up_the_states() -> None:
    first = Grammars(TOKENIZER).compile(COUNTED).result()
    unfinished, twin = first.copy(), Grammars(TOKENIZER).compile(COUNTED).result().copy()
    for token_id in TOKENIZER.encode_plain("abbab" * 4):
        assert allowed(unfinished) == allowed(twin)
        unfinished.accept(token_id)
        twin.accept(token_id)
    for token_id in TOKENIZER.encode_plain("ba"):
        fork = unfinished.copy()
        number = first._beginning.number
        for seed in range(40):
            follow(first.copy(), seed)
        assert first._beginning.number > number
        assert allowed(unfinished) == allowed(fork) == allowed(twin)
        unfinished.accept(token_id)
        twin.accept(token_id)


@pytest.mark.usefixtures("few_states")
def test_answers_of_one_batch_go_on_although_each_uses_up_the_states_of_the_others() -> None:
    first = Grammars(TOKENIZER).compile(COUNTED).result()
    matchers, chosen = [first.copy() for _ in range(40)], random.Random(0)
    for _ in range(60):
        permitted = [sorted({*allowed(matcher)} - {*TOKENIZER.eos_ids}) for matcher in matchers]
        assert all(permitted)
        for matcher, token_ids in zip(matchers, permitted, strict=True):
            matcher.accept(chosen.choice(token_ids))
    assert not any(matcher.error for matcher in matchers)


@pytest.mark.usefixtures("few_states")
def test_a_beginning_that_takes_long_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher_module, "MAX_BEGIN_SECONDS", -1.0)
    grammars = Grammars(TOKENIZER)
    first = grammars.compile(COUNTED).result()
    assert not all(follow(first.copy(), seed) for seed in range(40))
    failed = first.copy()
    assert not allowed(failed)
    assert "too many states" in failed.error
    assert follow(grammars.compile(COUNTED).result().copy(), 0)  # of a later request, compiled again


def test_an_answer_that_is_too_complex_by_itself_may_not_end() -> None:
    """The mask of llguidance permits the end after an error."""
    matcher = compiled(schema({"type": "integer", "multipleOf": 9999}))
    for token_id in TOKENIZER.encode_plain("1" * 8):
        permitted = allowed(matcher)
        assert not {*TOKENIZER.eos_ids} & {*permitted}
        if not permitted:
            break
        matcher.accept(token_id)
    assert not permitted
    assert "too many" in matcher.error
