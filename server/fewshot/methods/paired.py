"""Compares two methods, or two settings of a method, by the examples that only one of them answers correctly."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, fsum, lgamma, log, sqrt

import numpy as np
from numpy.typing import ArrayLike

# a smaller lead, in standard errors, is not clear
MIN_LEAD = 1.0


@dataclass(frozen=True, slots=True)
class Paired:
    """The numbers of examples that only the first answers correctly (`wins`), and only the second (`losses`)."""

    wins: int
    losses: int

    @classmethod
    def of(cls, first: ArrayLike, second: ArrayLike) -> Paired:
        """Compare which examples [N] each answers correctly; of a mean over repetitions, the larger share wins."""
        difference = np.subtract(first, second, dtype=np.float64)
        return cls(int((difference > 0).sum()), int((difference < 0).sum()))

    @property
    def lead(self) -> float:
        """Wins minus losses, in standard errors."""
        # one of each is added, so that a few wins without a loss are not certain
        return (self.wins - self.losses) / sqrt(self.wins + self.losses + 2)

    @property
    def is_clear(self) -> bool:
        """True if the first leads by more than is likely by chance: enough for a choice, not for a claim."""
        return self.lead > MIN_LEAD

    @property
    def p_value(self) -> float:
        """The probability of a difference as large in either direction by chance: the exact sign test, or McNemar's."""
        number, fewer = self.wins + self.losses, min(self.wins, self.losses)
        terms = (lgamma(number + 1) - lgamma(n + 1) - lgamma(number - n + 1) for n in range(fewer + 1))
        return min(1.0, 2 * fsum(exp(term - number * log(2)) for term in terms))
