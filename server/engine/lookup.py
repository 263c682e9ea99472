"""Proposes the next tokens of a sequence: those that followed its last tokens where they occurred before (prompt lookup).

An answer after a few shots repeats words of the shots. A step that computes the proposed tokens too finds out which of them
the model would have chosen (Saxena 2023, "Prompt Lookup Decoding"). What it costs depends on the machine and the load, and
what it gains on the text. So a lookup predicts every token, proposed or not, and counts its hits: text that does not repeat
costs no more than these searches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import takewhile

# the lengths of the suffixes that are searched for, the longest first
LENGTHS = (3, 2)
# the weight of the last prediction in the share of hits
WEIGHT = 0.2


class Lookup:
    """The tokens of a sequence as the characters of a string, in which suffixes are found fast."""

    def __init__(self) -> None:
        self._text = ""
        self._next = -1  # where the predicted next token is; -1: none is predicted
        self.hit_share = 0.0  # of predictions, the last ones count most

    def __len__(self) -> int:
        return len(self._text)

    def begin(self, token_ids: Iterable[int]) -> None:
        """Take tokens that are not predicted: those of a prompt."""
        self._text += "".join(map(chr, token_ids))
        self._next = self._find()

    def extend(self, token_ids: Iterable[int]) -> None:
        """Take generated tokens, and count which of them were predicted."""
        for token_id in token_ids:
            if self._next >= 0:
                is_hit = self._text[self._next] == chr(token_id)
                self.hit_share += WEIGHT * (is_hit - self.hit_share)
                self._next = self._next + 1 if is_hit else -1
            self._text += chr(token_id)
        self._next = self._find()

    def predict(self, count: int, ends: Collection[int]) -> list[int]:
        """Return the next tokens, at most `count`, up to the first of `ends`; none if nothing is predicted."""
        if self._next < 0:
            return []
        period = len(self._text) - self._next  # after which what is predicted follows itself
        token_ids = (ord(self._text[self._next + i % period]) for i in range(count))
        return list(takewhile(lambda token_id: token_id not in ends, token_ids))

    def _find(self) -> int:
        """Return the position after the last earlier occurrence of the longest suffix that occurred before, or -1."""
        for length in LENGTHS:
            if length < len(self._text):
                start = self._text.rfind(self._text[-length:], 0, -1)
                if start >= 0:
                    return start + length
        return -1


def num_worthwhile(hit_share: float, cost: float, limit: int) -> int:
    """Return how many tokens to propose: as many as are likely to save more time than they cost.

    `cost` is the time that one more token adds to a step, relative to the present time per token. Together they add at
    most the time of one token, so the other sequences of the step wait for little.
    """
    count, chance = 0, hit_share
    while count < limit and chance > cost and (count + 1) * cost <= 1:
        count += 1
        chance *= hit_share
    return count
