"""What a step learns from: every set of the mixture, or one by turns; each read as streams that processes share out.

A stream is a deterministic order of examples with a position. Its order never depends on how many processes there are:
each owns some streams whole, so a step's examples are the same for one process as for many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from training.examples import Tokens


@dataclass(frozen=True, slots=True)
class Prepared:
    """Tokens, and what each of their media shows: pixels [F, 3, h, w] or features [F, P, Dv]."""

    tokens: Tokens
    media: Mapping[bytes, Tensor]


class Stream(Protocol):
    def take(self) -> Prepared:
        """The next good example; bad records are passed over and counted."""

    def state(self) -> Any:
        """The position as JSON."""

    def load_state(self, state: Any) -> None: ...


class Generated:
    """Examples made from their number alone: the n-th of a stream is the same in every run."""

    def __init__(self, make: Callable[[int], Prepared], index: int = 0, num_streams: int = 1) -> None:
        self._make = make
        self._index, self._num_streams = index, num_streams
        self._taken = 0

    def take(self) -> Prepared:
        number = self._taken * self._num_streams + self._index
        self._taken += 1
        return self._make(number)

    def state(self) -> Any:
        return self._taken

    def load_state(self, state: Any) -> None:
        self._taken = int(state)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """This process's streams of a set, by their number among all of the set's streams."""

    name: str
    weight: float
    streams: Mapping[int, Stream]
    per_stream: int  # examples that a step takes from each

    def batch(self) -> list[Prepared]:
        return [stream.take() for _ in range(self.per_stream) for stream in self.streams.values()]


def owned(num_streams: int, rank: int, num_processes: int) -> range:
    """The streams of a process; every process must have equally many."""
    if num_streams % num_processes:
        raise ValueError(f"{num_streams} streams cannot be shared out evenly to {num_processes} processes")
    return range(rank, num_streams, num_processes)


class Mixture:
    def __init__(self, sets: Sequence[DataSet], accumulate: Literal["all", "round_robin"]) -> None:
        self.sets = tuple(sets)
        self._accumulate = accumulate

    def of_step(self, step: int) -> tuple[DataSet, ...]:
        return self.sets if self._accumulate == "all" else (self.sets[step % len(self.sets)],)

    def state(self) -> dict[str, Any]:
        return {f"{one.name}/{number}": stream.state() for one in self.sets for number, stream in one.streams.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for one in self.sets:
            for number, stream in one.streams.items():
                stream.load_state(state[f"{one.name}/{number}"])
