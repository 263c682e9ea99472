"""A cache of the most recently used values; concurrent requests for a key build its value only once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from operator import attrgetter
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

from server.lru_cache import LruCache

MAX_BYTES = 256 * 2**20


Value = TypeVar("Value")


class Recent(Generic[Value]):
    """The most recently used values, up to a number of bytes; the last one stays, whatever its size. No value is None."""

    def __init__(self, max_bytes: int = MAX_BYTES, size_of: Callable[[Value], int] = attrgetter("num_bytes")) -> None:
        self._values = LruCache[Hashable, Value](max_bytes, size_of, min_number=1)
        self._building: WeakValueDictionary[Hashable, asyncio.Lock] = WeakValueDictionary()

    async def get(self, key: Hashable, build: Callable[[], Awaitable[Value]]) -> Value:
        """Return the value of a key; build it if it is missing.

        If building fails or is cancelled, the next request that waits for the key tries again.
        """
        lock = self._building.setdefault(key, asyncio.Lock())
        async with lock:
            if (value := self._values.get(key)) is None:
                value = await build()
                self._values.put(key, value)
        return value
