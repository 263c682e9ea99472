"""Shows the progress of a download as log lines, if standard error is not a terminal."""

from __future__ import annotations

import io
import logging
from typing import Any

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

SECONDS = 10.0


class LogProgress(tqdm):  # type: ignore[type-arg]  # it iterates over nothing
    """A progress bar that logs a line every ten seconds instead of drawing.

    `snapshot_download` opens several bars; one of them counts the bytes of all files. Output of a bar that is closed is
    discarded.
    """

    repository = ""
    # no thread that redraws bars which are seldom updated; it may fail while several threads open bars
    monitor_interval = 0

    @classmethod
    def of(cls, repository: str) -> type[LogProgress]:
        return type(cls.__name__, (cls,), {"repository": repository})

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # `miniters`: otherwise no line is due until as many bytes have arrived as in the fastest ten seconds
        options |= {"mininterval": SECONDS, "miniters": 1, "file": io.StringIO()}
        super().__init__(*arguments, **options)

    def update(self, n: float | None = 1) -> bool | None:
        is_due = super().update(n)
        # the bar with another format counts the same bytes before they are unpacked
        if is_due and self.unit == "B" and self.bar_format is None:
            logger.info("downloading %s: %.0f of %.0f MB", self.repository, self.n / 1e6, (self.total or 0) / 1e6)
        return is_due

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw nothing."""
