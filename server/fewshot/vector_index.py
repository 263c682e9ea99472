"""Exact search for the vectors that are most similar to a query: sets are small enough to compare all."""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from model.likeness import Vectors


@dataclass(frozen=True, slots=True)
class Similar:
    """The index of an example in the set, and its similarity to the query, from -1 to 1."""

    index: int
    score: float


class VectorIndex:
    """Exact search by inner product over vectors [N, D] of length one."""

    def __init__(self, vectors: Vectors) -> None:
        self.num_bytes = vectors.nbytes
        self._num_vectors, width = vectors.shape
        self._index = faiss.IndexFlatIP(width)
        self._index.add(np.ascontiguousarray(vectors))

    def search(self, query: Vectors, k: int) -> list[Similar]:
        """Return the `k` vectors most similar to `query` [D], best first; equal scores in the order of their indices."""
        k = min(k, self._num_vectors)
        if k == 0:
            return []
        scores, indices = self._nearest(query, min(k + 1, self._num_vectors))
        if len(scores) > k and scores[k] == scores[k - 1]:
            # among equal scores the library may return any: rank all vectors
            scores, indices = self._nearest(query, self._num_vectors)
        best = np.lexsort((indices, -scores))[:k]
        return [Similar(int(indices[rank]), float(np.clip(scores[rank], -1, 1))) for rank in best]

    def _nearest(self, query: Vectors, k: int) -> tuple[Vectors, NDArray[np.int64]]:
        scores, indices = self._index.search(np.ascontiguousarray(query[None]), k)
        return scores[0], indices[0]
