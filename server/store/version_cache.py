"""Keeps recently read versions of support sets. Threads that need a version while another one reads it wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from server.lru_cache import LruCache
from server.store.examples import Examples
from server.store.records import Example

# the id of a support set and the number of its version, which never changes
Key = tuple[str, int]


class VersionCache:
    """The examples of versions, of at most `max_bytes` in total; the last one stays, whatever its size."""

    def __init__(self, max_bytes: int) -> None:
        self._lock = threading.Lock()
        self._versions = LruCache[Key, Examples[Example]](max_bytes, _num_bytes, min_number=1)
        self._reading = dict[Key, threading.Lock]()

    def find(self, key: Key, read: Callable[[], Examples[Example]]) -> Examples[Example]:
        """Return the examples of a version, which `read` returns. Raises its errors."""
        with self._lock:
            if (examples := self._versions.get(key)) is not None:
                return examples
            reading = self._reading.setdefault(key, threading.Lock())
        with reading:
            with self._lock:
                examples = self._versions.get(key)
            if examples is None:
                examples = self._read(key, read)
        return examples

    def _read(self, key: Key, read: Callable[[], Examples[Example]]) -> Examples[Example]:
        try:
            examples = read()
            with self._lock:
                self._versions.put(key, examples)
        finally:
            with self._lock:
                self._reading.pop(key, None)
        return examples


def _num_bytes(examples: Examples[Example]) -> int:
    return sum(example.num_bytes for example in examples)
