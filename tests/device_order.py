"""The order of work on the streams of the stand-in for a GPU: what one stream writes, another reads only after a wait.

Work is computed at once, so nothing goes wrong if a wait is missing, but the order says so. Each stream counts its work,
and knows how much of that of the others comes before its next: as much as it has waited for, or the host has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias
from unittest import mock

import torch
from torch import Tensor

Point: TypeAlias = "dict[Stream, int]"  # how much of the work of each stream is done
EMPTY = 0x55  # in memory to which a copy has not come yet


@dataclass(frozen=True, eq=False)
class Event:
    point: Point


class Stream:
    def __init__(self, device: object = None) -> None:
        self.count = 0
        self.done: Point = {}  # by other streams

    def point(self) -> Point:
        return {**self.done, self: self.count}

    def wait(self, point: Point) -> None:
        for stream, count in point.items():
            self.done[stream] = max(count, self.done.get(stream, 0))

    def record_event(self) -> Event:
        return Event(self.point())

    def wait_event(self, event: Event) -> None:
        self.wait(event.point)

    def comes_after(self, other: Stream, count: int) -> bool:
        return other is self or self.done.get(other, 0) >= count


@dataclass(eq=False)
class Copy:
    """A copy between device and memory of the host, which had or will have these values."""

    stream: Stream
    count: int
    memory: Tensor
    values: Tensor


class Order:
    """Streams and what they were given to do."""

    def __init__(self) -> None:
        self.current = Stream()
        self._host = Stream()
        self._writes: dict[int, tuple[Stream, int]] = {}  # the last one, by address
        self._reads: dict[int, Point] = defaultdict(dict)  # since then
        self._row_sizes: dict[int, int] = {}  # bytes, by address of tensors whose rows are memory of their own
        self._uploads: list[Copy] = []
        self._downloads: list[Copy] = []

    def by_row(self, tensor: Tensor) -> None:
        """Let the rows of a tensor be read and written by themselves."""
        self._row_sizes[_address(tensor)] = tensor[0].nbytes

    def _memory(self, tensors: Iterable[Tensor]) -> set[int]:
        addresses: set[int] = set()
        for tensor in tensors:
            address = _address(tensor)
            size = self._row_sizes.get(address)
            first = tensor.data_ptr()
            addresses.update([address] if size is None else range(first, first + tensor.nbytes, size))
        return addresses

    def launch(self, reads: Iterable[Tensor], writes: Iterable[Tensor] = (), results: Iterable[Tensor] = ()) -> None:
        """Give the current stream work on the content of tensors; results are in new memory, or views of what it reads."""
        stream, read, written = self.current, self._memory(reads), self._memory(writes)
        stream.wait(self._host.done)
        stream.count += 1
        for address in read | written:
            if address in self._writes:
                assert stream.comes_after(*self._writes[address]), "a stream reads what another one may still write"
        for address in written:
            for reader, count in self._reads[address].items():
                assert stream.comes_after(reader, count), "a stream writes what another one may still read"
        for address in read:
            self._reads[address][stream] = stream.count
        for address in written | (self._memory(results) - read):
            self._writes[address] = (stream, stream.count)
            self._reads.pop(address, None)

    def upload(self, source: Tensor) -> None:
        """Begin a copy from pinned memory."""
        self._uploads.append(Copy(self.current, self.current.count, source, source.clone()))

    def download(self, target: Tensor, values: Tensor) -> None:
        """Begin a copy to pinned memory, which comes there when the host waits for it."""
        target.fill_(EMPTY)
        self._downloads.append(Copy(self.current, self.current.count, target, values.clone()))

    def synchronize(self, point: Point) -> bool:
        """Let the host wait, and return whether a copy has come."""
        self._host.wait(point)
        for copy in self._ended(self._uploads):
            assert torch.equal(copy.memory, copy.values), "the host has overwritten memory that was still copied"
        arrived = self._ended(self._downloads)
        for copy in arrived:
            copy.memory.copy_(copy.values)
        return bool(arrived)

    def _ended(self, copies: list[Copy]) -> list[Copy]:
        ended = [copy for copy in copies if self._host.comes_after(copy.stream, copy.count)]
        for copy in ended:
            copies.remove(copy)
        return ended

    @contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def in_place_of_cuda(self, waits: list[str]) -> Iterator[None]:
        """Let torch give these streams and their events, and note when the host waits for one."""
        order = self

        class RecordedEvent:
            def record(self) -> None:
                self.point = order.current.point()

            def synchronize(self) -> None:
                waits.append("copy to the host" if order.synchronize(self.point) else "an event")

        fakes: dict[str, Any] = {
            "Stream": Stream,
            "Event": RecordedEvent,
            "stream": self.on_stream,
            "current_stream": lambda: order.current,
        }
        with mock.patch.multiple(torch.cuda, **fakes):
            yield


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
