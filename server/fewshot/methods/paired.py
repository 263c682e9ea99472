"""Compares two methods, or two settings of a method, by their answers to the same examples."""

from __future__ import annotations

from dataclasses import dataclass
from math import erfc, exp, fsum, lgamma, log, sqrt

import numpy as np
from numpy.typing import ArrayLike

# a smaller lead, in standard errors, is not clear
MIN_LEAD = 1.0


@dataclass(frozen=True, slots=True)
class Paired:
    """The differences of two shares of correct answers on the same examples, between -1 and 1.

    `wins` and `losses` are the numbers of examples that the first answers correctly more often, and the second; `total` is
    the sum of the differences, and `squares` that of their squares.
    """

    wins: int
    losses: int
    total: float
    squares: float

    @classmethod
    def of(cls, first: ArrayLike, second: ArrayLike) -> Paired:
        """Compare which examples [N] each answers correctly, or the shares of repetitions in which it does."""
        difference = np.subtract(first, second, dtype=np.float64)
        wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
        return cls(wins, losses, float(difference.sum()), float((difference**2).sum()))

    @property
    def lead(self) -> float:
        """The sum of the differences in standard errors; without repetitions, wins minus losses."""
        # one of each is added, so that a few wins without a loss are not certain
        return self.total / sqrt(self.squares + 2)

    @property
    def is_clear(self) -> bool:
        """True if the first leads by more than is likely by chance: enough for a choice, not for a claim."""
        return self.lead > MIN_LEAD

    @property
    def has_shares(self) -> bool:
        """True if one of them answered an example correctly in a part of its repetitions."""
        return self.squares < self.wins + self.losses

    @property
    def p_value(self) -> float:
        """The probability of a difference as large in either direction by chance.

        It is that of the exact sign test (McNemar's) or, if there are shares, of the normal distribution: 4 of 5
        repetitions against 1 of 1 are a small difference and no loss.
        """
        if self.has_shares:
            return erfc(abs(self.lead) / sqrt(2))
        number, fewer = self.wins + self.losses, min(self.wins, self.losses)
        terms = (lgamma(number + 1) - lgamma(n + 1) - lgamma(number - n + 1) for n in range(fewer + 1))
        return min(1.0, 2 * fsum(exp(term - number * log(2)) for term in terms))
