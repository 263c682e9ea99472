"""Logs skipped records: bad records are counted by reason, and the first records of each reason are logged."""

from __future__ import annotations

import logging
from collections import Counter

log = logging.getLogger(__name__)
MAX_LOGGED = 5


class BadRecord(ValueError):
    """A record from which nothing can be learned: `reason` is counted, `detail` is only logged."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class BadRecordLog:
    def __init__(self, set_name: str) -> None:
        self.set_name = set_name
        self.counts: Counter[str] = Counter()

    def add(self, record: str, error: BadRecord) -> None:
        self.counts[error.reason] += 1
        if self.counts[error.reason] <= MAX_LOGGED:
            log.warning("set %s: skipped record %s: %s", self.set_name, record, error)
