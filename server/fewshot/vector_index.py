"""Which of many vectors are most like one: exact search by inner product, and the indexes that were searched last.

An index is faiss's flat one: it computes every score, so nothing is missed, and a set of examples is small enough.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from weakref import WeakValueDictionary

import faiss
import numpy as np
from numpy.typing import NDArray

from server.fewshot.selection import Similar

Vectors = NDArray[np.float32]

MAX_INDEX_BYTES = 256 * 2**20


class VectorIndex:
    def __init__(self, vectors: Vectors) -> None:
        """`vectors`: [N, D], of length one."""
        self.num_bytes = vectors.nbytes
        self._num_vectors, width = vectors.shape
        self._index = faiss.IndexFlatIP(width)
        self._index.add(np.ascontiguousarray(vectors))

    def search(self, query: Vectors, k: int) -> list[Similar]:
        """The `k` most like `query` [D], best first; of equals the one of the lowest place."""
        k = min(k, self._num_vectors)
        if k == 0:
            return []
        scores, places = self._nearest(query, min(k + 1, self._num_vectors))
        if len(scores) > k and scores[k] == scores[k - 1]:
            # which of the equals are among the k is not for the library to say
            scores, places = self._nearest(query, self._num_vectors)
        best = np.lexsort((places, -scores))[:k]
        return [Similar(int(places[at]), float(np.clip(scores[at], -1, 1))) for at in best]

    def _nearest(self, query: Vectors, k: int) -> tuple[Vectors, NDArray[np.int64]]:
        scores, places = self._index.search(np.ascontiguousarray(query[None]), k)
        return scores[0], places[0]


class RecentIndexes:
    """Indexes by key, those used last; each is made once, however many requests ask for it meanwhile."""

    def __init__(self, max_bytes: int = MAX_INDEX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._indexes: OrderedDict[Hashable, VectorIndex] = OrderedDict()
        self._making: WeakValueDictionary[Hashable, asyncio.Lock] = WeakValueDictionary()

    async def get(self, key: Hashable, vectors: Callable[[], Awaitable[Vectors]]) -> VectorIndex:
        """`vectors` is awaited for a key that is not there. If it fails or is cancelled, the next in line tries."""
        lock = self._making.setdefault(key, asyncio.Lock())
        async with lock:
            if (index := self._indexes.get(key)) is None:
                index = self._indexes[key] = VectorIndex(await vectors())
            self._indexes.move_to_end(key)
            self._forget()
        return index

    def _forget(self) -> None:
        """The last one stays, whatever its size."""
        while len(self._indexes) > 1 and sum(index.num_bytes for index in self._indexes.values()) > self._max_bytes:
            self._indexes.popitem(last=False)
