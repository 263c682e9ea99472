"""Estimates the time that a running evaluation still takes, from the measured time of its answers so far."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from server.quality.evaluation import PromptSetting

# fewer answers tell little: the first ones are also those that encode the media
MIN_ANSWERS = 8
# a prompt without shots takes about as long as this number of shots whose media are cached (default model, two cores)
SHOTS_OF_A_QUERY = 8


class RemainingTime:
    """The prompts that are left of an evaluation, and the time that those before them took since the server began."""

    def __init__(self, prompts: Iterable[PromptSetting], num_queries: int) -> None:
        self._left = Counter(dict.fromkeys(prompts, num_queries))
        self._num_answers = 0
        self._work_done = 0
        self._began: float | None = None

    def begin(self) -> None:
        """Begin to measure, unless it has begun: what comes before the first prompt is no measure of the others."""
        self._began = time.monotonic() if self._began is None else self._began

    def count(self, prompt: PromptSetting) -> None:
        """Count an answer to one of the queries of a prompt."""
        self._left[prompt] -= 1
        self._num_answers += 1
        self._work_done += _work(prompt)

    def end(self, prompt: PromptSetting) -> None:
        """Drop what is left of a prompt, which has failed or has all of its answers."""
        del self._left[prompt]

    def seconds(self) -> float | None:
        """Return the time that is left, or None while too little was measured."""
        if self._began is None or self._num_answers < MIN_ANSWERS:
            return None
        work_left = sum(count * _work(prompt) for prompt, count in self._left.items())
        return round((time.monotonic() - self._began) * work_left / self._work_done, 1)


def _work(prompt: PromptSetting) -> int:
    return prompt.k + SHOTS_OF_A_QUERY
