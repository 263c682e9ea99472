"""Bad records are passed over, and never silently: counted by what was wrong, the first of each kind logged by name."""

from __future__ import annotations

import logging
from collections import Counter

log = logging.getLogger(__name__)
NAMED = 5


class BadRecord(ValueError):
    """A record that nothing can be learned from: `reason` is counted, the rest is said."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class Complaints:
    def __init__(self, set_name: str) -> None:
        self.set_name = set_name
        self.counts: Counter[str] = Counter()

    def add(self, record: str, error: BadRecord) -> None:
        self.counts[error.reason] += 1
        if self.counts[error.reason] <= NAMED:
            log.warning("%s: %s passed over: %s", self.set_name, record, error)
