"""Constrains answers to a choice of strings, a regular expression or a JSON schema, by llguidance.

It does not import torch: the API process checks a grammar with the same functions before it admits a request.
"""

from __future__ import annotations

import json
from functools import cached_property

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from model.prompt import PromptTokenizer
from server.wire import Grammar


class GrammarError(ValueError):
    """A grammar that cannot be used; the message is for the client."""


def source(grammar: Grammar) -> str:
    """Return the grammar in llguidance's own language. Raises `GrammarError`."""
    match grammar.kind:
        case "choice":
            if not grammar.choices or not all(grammar.choices):
                raise GrammarError("choice must have at least one string, and no empty one")
            text = LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, grammar.choices)))
        case "regex":
            text = LLMatcher.grammar_from_regex(grammar.text)
        case "json":
            try:
                text = LLMatcher.grammar_from_json_schema(grammar.text)
            except ValueError as error:
                raise GrammarError(f"not a JSON schema: {error}") from None
    if problem := LLMatcher.validate_grammar(text):
        raise GrammarError(problem.splitlines()[0])
    return text


class Grammars:
    """Creates matchers for one tokenizer, whose table of tokens is built for the first grammar."""

    def __init__(self, tokenizer: PromptTokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _table(self) -> LLTokenizer:
        return LLTokenizer(self._tokenizer.to_json(), eos_token=list(self._tokenizer.eos_ids))

    def matcher(self, grammar: Grammar) -> Matcher:
        return Matcher(LLMatcher(self._table, source(grammar), log_level=0))


class Matcher:
    """The state of one answer in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        """True if only the end of the answer may follow."""
        return self._matcher.is_stopped()

    def allowed(self, vocab_size: int) -> np.ndarray:
        """Return bool [V]: the tokens that may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.zeros(vocab_size, dtype=bool)
        allowed = np.unpackbits(bits, bitorder="little")[:vocab_size].astype(bool)
        mask[: len(allowed)] = allowed
        return mask

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
