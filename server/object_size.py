"""The memory of an object with everything that it refers to, for caches whose limits are in bytes."""

from __future__ import annotations

import gc
import sys


def size_of(value: object) -> int:
    """Return the bytes of an object and of all that it refers to, each counted once. Classes do not count."""
    total, seen, waiting = 0, set[int](), [value]
    while waiting:
        item = waiting.pop()
        if id(item) not in seen and not isinstance(item, type):
            seen.add(id(item))
            total += sys.getsizeof(item)
            waiting += gc.get_referents(item)
    return total
