"""Drives an engine in this process, with no HTTP around it: a closed loop of so many clients, and when each token came.

A closed loop sends the next request of a client when its last one has ended, as a load generator with a fixed number of
connections does.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from bench.table import Sample
from server.engine.engine import Engine
from server.wire import Finished, Generate, MediaPixels, MediaWanted, Outbound, Token


class BenchFailed(RuntimeError):
    """A program under test did not do what was asked, so its time means nothing."""


@dataclass(slots=True)
class Trace:
    """One request: when it was handed over, and when each of its tokens came."""

    added: float
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def first_token_seconds(self) -> float:
        return self.times[0] - self.added

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.times)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a list of requests, in their order."""

    traces: tuple[Trace, ...]
    seconds: float

    @property
    def num_tokens(self) -> int:
        return sum(len(trace.times) for trace in self.traces)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def first_token(self) -> Sample:
        return Sample(tuple(trace.first_token_seconds for trace in self.traces))

    @property
    def between_tokens(self) -> Sample:
        return Sample(tuple(gap for trace in self.traces for gap in trace.gaps))

    @property
    def decode_tokens_per_second(self) -> float:
        """Of all sequences together, from when the last has its first token until the first is done."""
        begin = max(trace.times[0] for trace in self.traces)
        end = min(trace.times[-1] for trace in self.traces)
        counted = sum(begin < t <= end for trace in self.traces for t in trace.times)
        return counted / (end - begin)


class Driver:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._open: dict[str, Trace] = {}
        self._frames: Mapping[bytes, np.ndarray] = {}

    def run(self, requests: Sequence[Generate], frames: Mapping[bytes, np.ndarray], concurrency: int) -> Outcome:
        """`frames` holds decoded media by source digest; ids of requests must differ."""
        self._frames = frames
        waiting, traces = deque(requests), dict[str, Trace]()
        began = time.perf_counter()
        while waiting or self._open:
            while waiting and len(self._open) < concurrency:
                request = waiting.popleft()
                traces[request.request_id] = self._open[request.request_id] = Trace(time.perf_counter())
                self.engine.add(request)
            for event in self.engine.step():
                self._take(event)
        return Outcome(tuple(traces.values()), time.perf_counter() - began)

    def _take(self, event: Outbound) -> None:
        match event:
            case MediaWanted(digest):
                self.engine.supply(pixels(digest, self._frames[digest]))
            case Token():
                trace = self._open[event.request_id]
                trace.token_ids.append(event.token_id)
                trace.times.append(time.perf_counter())
                if event.finish_reason is not None:
                    del self._open[event.request_id]
            case Finished():
                raise BenchFailed(f"request {event.request_id} ended with {event.finish_reason}: {event.error}")


def pixels(digest: bytes, frames: np.ndarray) -> MediaPixels:
    count, height, width, channels = frames.shape
    return MediaPixels(digest=digest, shape=(count, height, width, channels), data=frames.tobytes())
