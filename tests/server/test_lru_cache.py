"""A cache drops the values that were used longest ago."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from server.lru_cache import LruCache

A, B, C, D = (letter.encode() * 32 for letter in "abcd")


def test_the_size_of_an_lru_cache_is_in_the_units_of_its_values() -> None:
    host = LruCache[bytes, torch.Tensor](100, lambda tokens: tokens.nbytes)
    host.put(A, torch.zeros(10))  # 40 bytes
    host.put(B, torch.zeros(10))
    assert host.get(A) is not None
    host.put(C, torch.zeros(10))
    assert (A in host, B in host, C in host) == (True, False, True)
    assert host.size == 80
    host.put(D, torch.zeros(100))  # larger than all there is
    assert host.size == 0


def test_the_least_recently_used_value_is_dropped_first() -> None:
    pooled = LruCache[bytes, NDArray[np.float32]](2)
    for key in (A, B):
        pooled.put(key, np.ones(3, np.float32))
    assert pooled.get(A) is not None
    pooled.put(C, np.ones(3, np.float32))
    assert (A in pooled, B in pooled, C in pooled) == (True, False, True)
    assert pooled.get(B) is None


def test_the_last_used_values_stay_whatever_their_size() -> None:
    texts = LruCache[str, str](3, len, min_number=1)
    texts.put("a", "abcd")
    texts.put("a", "abcde")  # instead of the first
    assert ("a" in texts, texts.size) == (True, 5)
    texts.put("b", "efgh")
    assert ("a" in texts, "b" in texts, texts.size) == (False, True, 4)
