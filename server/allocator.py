"""Sets glibc's allocator so that the memory of large bodies and media goes back to the system when they are freed.

By default, glibc takes a buffer from its heap instead of the system if a larger one has been freed before, and a small
buffer above it on the heap then keeps it. So a process stays as large as its largest traffic, although its memory is free.
"""

from __future__ import annotations

import ctypes

# of <malloc.h>: buffers from this size on are taken from the system; the free bytes at the end of a heap that are kept for
# smaller ones; and the number of heaps, between which threads choose
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX = -3, -1, -8
LARGE = 2**20
KEPT = 2**24
HEAPS = 4


def return_freed_memory() -> None:
    """Return large freed buffers of this process to the system. Without glibc, do nothing.

    It must be called before threads start, and not in the worker: its tensors are large, and reused in each step.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_ARENA_MAX, HEAPS)
