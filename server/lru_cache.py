"""A cache that drops the least recently used values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LruCache(Generic[Key, Value]):
    """Values by key, of at most `max_size` in total; the `min_number` last used ones stay, whatever their size.

    The size of a value is that of the time when it was put.
    """

    def __init__(
        self, max_size: int, size_of: Callable[[Value], int] = lambda value: 1, *, min_number: int = 0
    ) -> None:
        self.max_size = max_size
        self.size = 0
        self._size_of = size_of
        self._min_number = min_number
        self._sized: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._sized

    def get(self, key: Key) -> Value | None:
        if key not in self._sized:
            return None
        self._sized.move_to_end(key)
        return self._sized[key][0]

    def put(self, key: Key, value: Value) -> None:
        self.discard(key)
        size = self._size_of(value)
        self._sized[key] = value, size
        self.size += size
        while self.size > self.max_size and len(self._sized) > self._min_number:
            self.discard(next(iter(self._sized)))

    def discard(self, key: Key) -> None:
        if key in self._sized:
            self.size -= self._sized.pop(key)[1]
