"""Follows grammars by llguidance: which tokens may come next in an answer, within limits of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from server.grammar import GrammarError

# Bytes without an alternative, of which a longer run is written by tokens of its own, all but the last ones: others may
# continue those. For each token, llguidance would tokenize the whole run again, and 90,000 bytes take 20 milliseconds.
RUN_BYTES = 512
LAST_TOKENS = 8
# Seconds of processor time that each token of an answer may take, and what all of a request may take beyond that: all
# other requests wait for them.
TOKEN_SECONDS = 0.01
REQUEST_SECONDS = 2.0
TOO_SLOW = "tokens take too long"
# in llguidance's words for too many states of the lexer
LEXER_ERROR = "lexer error"
# Restarts at a token: other answers may have used up the newest beginning already, which is then computed again.
MAX_RESTARTS = 2
# processor time of a beginning that may be computed again between two tokens of an answer
MAX_BEGIN_SECONDS = 0.1


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


class Beginning:
    """The state at the beginning of a grammar, of which each answer has a copy; `begin` computes it.

    Copies share the states of the lexer that any of them has computed, up to a limit. At the limit, an answer goes on with
    the copy of a new beginning, which later answers copy, too. One that would take too long is computed for later requests
    only: this one `is_spent`.
    """

    def __init__(self, begin: Callable[[], LLMatcher]) -> None:
        self.number = 0
        self.is_spent = False
        self._begin = begin
        self._renew()

    def copy(self) -> LLMatcher:
        return self._state.deep_copy()

    def copy_after(self, number: int) -> LLMatcher | None:
        """Return a copy of a beginning after the one with this number; None if computing it would take too long."""
        if number == self.number:
            if self._seconds > MAX_BEGIN_SECONDS:
                self.is_spent = True
                return None
            try:
                self._renew()
            except GrammarError:  # it is the failure of this answer alone
                return None
        return self.copy()

    def _renew(self) -> None:
        began = time.thread_time()
        self._state = self._begin()
        self._seconds = time.thread_time() - began
        self.number += 1


class Matcher:
    """The state of one answer in its grammar, which takes `num_bytes` of memory.

    `ending` is None if the answer is never ended early.
    """

    def __init__(self, beginning: Beginning, table: LLTokenizer, ending: Ending | None, num_bytes: int = 0) -> None:
        self.num_bytes = num_bytes
        self._beginning = beginning
        self._number = beginning.number
        self._matcher = beginning.copy()
        self._table = table
        self._ending = ending
        self._forced: Sequence[int] = ()  # the next tokens, if they have no alternative
        self._tokens: list[int] = []  # of the answer
        self._time = TokenTime()

    def copy(self) -> Matcher:
        if not self._tokens:
            return Matcher(self._beginning, self._table, self._ending)
        copied = copy(self)
        copied._matcher, copied._tokens, copied._time = self._matcher.deep_copy(), [*self._tokens], TokenTime()
        return copied

    def copies(self, count: int) -> list[Matcher]:
        """Return copies for the answers of one request, which share the time that their tokens may take."""
        copies = [self.copy() for _ in range(count)]
        for copied in copies:
            copied._time = copies[0]._time
        return copies

    def must_end(self, num_left: int, max_tokens: int) -> bool:
        """Return whether an answer with `num_left` of its `max_tokens` left has to end now, to be complete.

        It never has to end before half of its tokens are used, however long its end is.
        """
        return self._ending is not None and num_left <= min(self._ending.num_tokens, max_tokens // 2)

    @property
    def error(self) -> str:
        """Why the grammar cannot be followed any further, in llguidance's words or `TOO_SLOW`; "" if it can."""
        return TOO_SLOW if self._time.is_spent else self._matcher.get_error()

    @property
    def is_spent(self) -> bool:
        """True if the grammar has to be compiled again for other answers."""
        return self._beginning.is_spent

    @property
    def is_complete(self) -> bool:
        """True if only the end of the answer may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self, vocab_size: int, *, ends: bool = False) -> np.ndarray:
        """Return bool [V]: the tokens that may come next, none after an error.

        With `ends`, if a token may come that ends a part of the answer, only that one is allowed.
        """
        mask = np.zeros(vocab_size, dtype=bool)
        if not self.error:
            with self._time:
                self._permit(mask)
                for _ in range(MAX_RESTARTS):
                    if self._restart():
                        self._permit(mask)
        if ends and self._ending is not None and (end := self._ending.next(mask)) is not None:
            mask[:] = False
            mask[end] = True
        return mask

    def accept(self, token_id: int) -> None:
        self._forced = self._forced[1:] if self._forced[:1] == [token_id] else ()
        self._tokens.append(token_id)
        with self._time:
            self._matcher.consume_token(token_id)
            for _ in range(MAX_RESTARTS):
                self._restart()

    def _restart(self) -> bool:
        """Follow the answer from a newer beginning if the lexer has too many states, which other answers may have caused.

        Return whether there was such a beginning.
        """
        if LEXER_ERROR not in self._matcher.get_error():
            return False
        if (matcher := self._beginning.copy_after(self._number)) is None:
            return False
        self._matcher, self._number = matcher, self._beginning.number
        matcher.consume_tokens(self._tokens)
        return True

    def _run(self) -> Sequence[int]:
        """Return the tokens that begin a long run of bytes without an alternative, none if there is no such run."""
        run = self._matcher.compute_ff_bytes()
        return self._table.tokenize_bytes(run[:RUN_BYTES])[:-LAST_TOKENS] if len(run) > RUN_BYTES else ()

    def _permit(self, mask: np.ndarray) -> None:
        """Set the tokens in bool [V] that may come next, none after an error."""
        if not self._matcher.is_error():
            self._forced = self._forced or self._run()
            if self._forced:
                mask[self._forced[0]] = True
            else:
                self._permit_any(mask)

    def _permit_any(self, mask: np.ndarray) -> None:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(mask)].astype(bool)
        if not self._matcher.is_error():  # whose mask would permit the end of the answer
            mask[: len(allowed)] = allowed


class TokenTime:
    """A context that measures the processor time of each token of a request; `is_spent` after too much of it."""

    def __init__(self) -> None:
        self._left = REQUEST_SECONDS
        self._began = 0.0

    @property
    def is_spent(self) -> bool:
        return self._left < 0

    def __enter__(self) -> None:
        self._began = time.thread_time()

    def __exit__(self, *_: object) -> None:
        self._left -= max(time.thread_time() - self._began - TOKEN_SECONDS, 0.0)
