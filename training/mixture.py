"""The mixture of data sets: a step uses all of them, or one in round-robin; a set is read as one or more streams.

A stream is a deterministic order of examples with a position. The order does not depend on the number of processes: each
process owns whole streams, so a step has the same examples on one process as on many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from training.examples import Tokens


@dataclass(frozen=True, slots=True)
class PreparedExample:
    """Tokens and their media by digest, as pixels [F, 3, h, w] or features [F, P, Dv]."""

    tokens: Tokens
    media: Mapping[bytes, Tensor]


def merge_media(examples: Iterable[PreparedExample]) -> dict[bytes, Tensor]:
    """Return the media of all examples by digest."""
    return {digest: frames for example in examples for digest, frames in example.media.items()}


class Stream(Protocol):
    def take(self) -> PreparedExample:
        """Return the next valid example; bad records are skipped and counted."""

    def state(self) -> Any:
        """Return the position as a JSON value."""

    def load_state(self, state: Any) -> None: ...


class GeneratedStream:
    """Examples that are generated from their number alone: the n-th example of a stream is the same in every run."""

    def __init__(self, make: Callable[[int], PreparedExample], index: int, num_streams: int) -> None:
        self._make = make
        self._index, self._num_streams = index, num_streams
        self._num_taken = 0

    def take(self) -> PreparedExample:
        number = self._num_taken * self._num_streams + self._index
        self._num_taken += 1
        return self._make(number)

    def state(self) -> Any:
        return self._num_taken

    def load_state(self, state: Any) -> None:
        self._num_taken = int(state)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """This process's streams of a set, by their index among all of the set's streams."""

    name: str
    weight: float
    streams: Mapping[int, Stream]
    per_stream: int  # examples per step and stream

    def batch(self) -> list[PreparedExample]:
        return [stream.take() for _ in range(self.per_stream) for stream in self.streams.values()]


def owned_streams(num_streams: int, rank: int, num_processes: int) -> range:
    """Return the indices of a process's streams.

    Raises ValueError if the number of streams is not a multiple of the number of processes.
    """
    if num_streams % num_processes:
        raise ValueError(f"{num_streams} streams cannot be divided evenly among {num_processes} processes")
    return range(rank, num_streams, num_processes)


class Mixture:
    def __init__(self, sets: Sequence[DataSet], accumulate: Literal["all", "round_robin"]) -> None:
        self.sets = tuple(sets)
        self._accumulate = accumulate

    def sets_for_step(self, step: int) -> tuple[DataSet, ...]:
        return self.sets if self._accumulate == "all" else (self.sets[step % len(self.sets)],)

    def state(self) -> dict[str, Any]:
        return {key: stream.state() for key, stream in self._streams_by_key()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for key, stream in self._streams_by_key():
            stream.load_state(state[key])

    def _streams_by_key(self) -> list[tuple[str, Stream]]:
        return [(f"{data_set.name}/{i}", stream) for data_set in self.sets for i, stream in data_set.streams.items()]
