"""Keeps recently read versions of support sets. Threads that need a version while another one reads it wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from operator import itemgetter

from server.lru_cache import LruCache
from server.store.examples import Examples
from server.store.records import Example

# the id of a support set and the number of its version, which never changes
Key = tuple[str, int]


class VersionCache:
    """The examples of versions, of at most `max_bytes` in total; the last one stays, whatever its size."""

    def __init__(self, max_bytes: int) -> None:
        self._lock = threading.Lock()
        # with their numbers of bytes
        self._versions = LruCache[Key, tuple[Examples[Example], int]](max_bytes, itemgetter(1), min_number=1)
        self._reading = dict[Key, Future[Examples[Example]]]()

    def find(self, key: Key, read: Callable[[], Examples[Example]]) -> Examples[Example]:
        """Return the examples of a version, which `read` returns. Raises its errors, in all threads that wait for it."""
        with self._lock:
            if (cached := self._versions.get(key)) is not None:
                return cached[0]
            pending = self._reading.get(key)
            reading = self._reading[key] = pending or Future()
        if pending is None:
            self._read(key, read, reading)
        return reading.result()

    def _read(self, key: Key, read: Callable[[], Examples[Example]], reading: Future[Examples[Example]]) -> None:
        try:
            examples = read()
            cached = examples, sum(example.num_bytes for example in examples)
        except BaseException as error:
            reading.set_exception(error)
        else:
            reading.set_result(examples)
            with self._lock:
                self._versions.put(key, cached)
        with self._lock:
            del self._reading[key]
