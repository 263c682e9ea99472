"""Shows the progress of a task on stderr: a bar on a terminal, and lines otherwise."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

# percent of a sequence between two log lines
PERCENT_PER_LINE = 25

log = logging.getLogger(__name__)


class Progress:
    """The progress of a task that has several stages."""

    def __init__(self, task: str, num_stages: int) -> None:
        self._task = task
        self._num_stages = num_stages
        self._stage = 0
        self._title = task

    def stage(self, title: str) -> None:
        """Begin the next stage."""
        self._stage += 1
        self._title = f"{self._task}, {self._stage}/{self._num_stages}: {title}"
        log.info("%s", self._title)

    def track(self, items: Sequence[Item]) -> Iterator[Item]:
        """Iterate over the items of the current stage and show how many are done."""
        if sys.stderr.isatty():
            yield from tqdm(items, desc=self._title, leave=False)
            return
        logged = 0
        for number, item in enumerate(items):
            percent = 100 * number // len(items)
            if percent >= logged + PERCENT_PER_LINE:
                logged = percent - percent % PERCENT_PER_LINE
                log.info("%s, %d %%", self._title, logged)
            yield item
