"""A closed-loop driver of an engine in this process, without HTTP, that records the time of each token.

A closed loop sends a client's next request when its previous one has finished, as a load generator with a fixed number of
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
    """Raised when a program under test did not complete the measured work, so that its time is meaningless."""


@dataclass(slots=True)
class Trace:
    """The timeline of one request: when it was added, and when each of its tokens was generated."""

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
    """The traces of a list of requests, in the order of the requests."""

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
        """The rate of all sequences together, from the last first token until the first sequence finishes.

        Raises `BenchFailed` if there is no time at which all of them decode.
        """
        begin = max(trace.times[0] for trace in self.traces)
        end = min(trace.times[-1] for trace in self.traces)
        if end <= begin:
            raise BenchFailed("a sequence finished before another began: decode more tokens per sequence")
        num_tokens = sum(begin < t <= end for trace in self.traces for t in trace.times)
        return num_tokens / (end - begin)


class Driver:
    """Runs requests through an engine and collects their traces."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._open: dict[str, Trace] = {}
        self._frames: Mapping[bytes, np.ndarray] = {}

    def run(self, requests: Sequence[Generate], frames: Mapping[bytes, np.ndarray], concurrency: int) -> Outcome:
        """Run all requests, `concurrency` at a time.

        `frames` holds decoded media by source digest. The ids of the requests must differ. Raises `BenchFailed` when a
        request does not finish normally.
        """
        self._frames = frames
        waiting, traces = deque(requests), dict[str, Trace]()
        began = time.perf_counter()
        while waiting or self._open:
            while waiting and len(self._open) < concurrency:
                request = waiting.popleft()
                traces[request.request_id] = self._open[request.request_id] = Trace(time.perf_counter())
                self.engine.add(request)
            for event in self.engine.step():
                self._handle(event)
        return Outcome(tuple(traces.values()), time.perf_counter() - began)

    def _handle(self, event: Outbound) -> None:
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
