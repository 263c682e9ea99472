"""Follows grammars by llguidance: which tokens may come next in an answer, within limits of time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher, LLTokenizer

# Bytes without an alternative, of which a longer run is written by tokens of its own, all but the last ones: others may
# continue those. For each token, llguidance would tokenize the whole run again, and 90,000 bytes take 20 milliseconds.
RUN_BYTES = 512
LAST_TOKENS = 8
# Seconds of processor time that each token of an answer may take, and what all of a request may take beyond that: all
# other requests wait for them.
TOKEN_SECONDS = 0.01
REQUEST_SECONDS = 2.0
TOO_SLOW = "tokens take too long"


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
    """The state of one answer in its grammar, which takes `num_bytes` of memory.

    `ending` is None if the answer is never ended early.
    """

    def __init__(self, matcher: LLMatcher, table: LLTokenizer, ending: Ending | None, num_bytes: int = 0) -> None:
        self.num_bytes = num_bytes
        self._matcher = matcher
        self._table = table
        self._ending = ending
        self._forced: Sequence[int] = ()  # the next tokens, if they have no alternative
        self._time = TokenTime()

    def copy(self) -> Matcher:
        copied = Matcher(self._matcher.deep_copy(), self._table, self._ending)
        copied._forced = self._forced
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
                self._forced = self._forced or self._run()
                if self._forced:
                    mask[self._forced[0]] = True
                else:
                    self._permit(mask)
        if ends and self._ending is not None and (end := self._ending.next(mask)) is not None:
            mask[:] = False
            mask[end] = True
        return mask

    def accept(self, token_id: int) -> None:
        self._forced = self._forced[1:] if self._forced[:1] == [token_id] else ()
        with self._time:
            self._matcher.consume_token(token_id)

    def _run(self) -> Sequence[int]:
        """Return the tokens that begin a long run of bytes without an alternative, none if there is no such run."""
        run = self._matcher.compute_ff_bytes()
        return self._table.tokenize_bytes(run[:RUN_BYTES])[:-LAST_TOKENS] if len(run) > RUN_BYTES else ()

    def _permit(self, mask: np.ndarray) -> None:
        """Set the tokens in bool [V] that may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(mask)].astype(bool)
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
