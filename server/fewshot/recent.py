"""A cache of the most recently used values; concurrent requests for a key build its value only once."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

MAX_BYTES = 256 * 2**20


class Sized(Protocol):
    """A value whose size never changes."""

    @property
    def num_bytes(self) -> int: ...


Value = TypeVar("Value", bound=Sized)


class Recent(Generic[Value]):
    """The most recently used values, up to a number of bytes."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._building: WeakValueDictionary[Hashable, asyncio.Lock] = WeakValueDictionary()

    async def get(self, key: Hashable, build: Callable[[], Awaitable[Value]]) -> Value:
        """Return the value of a key; build it if it is missing.

        If building fails or is cancelled, the next request that waits for the key tries again.
        """
        lock = self._building.setdefault(key, asyncio.Lock())
        async with lock:
            if (value := self._values.get(key)) is None:
                value = self._values[key] = await build()
                self._num_bytes += value.num_bytes
            self._values.move_to_end(key)
            # the most recently used value stays, whatever its size
            while len(self._values) > 1 and self._num_bytes > self._max_bytes:
                self._num_bytes -= self._values.popitem(last=False)[1].num_bytes
        return value
