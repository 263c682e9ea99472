"""The memory that the C library has allocated in this process, also for native code: glibc reports it, others do not."""

from __future__ import annotations

import ctypes
from typing import Any


class _Information(ctypes.Structure):
    """The structure `mallinfo2` of glibc 2.33 and later."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _function(name: str, result: Any) -> Any:
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function.restype = result
    return function


_mallinfo = _function("mallinfo2", _Information)
_trim = _function("malloc_trim", ctypes.c_int)


def num_bytes() -> int:
    """Return the bytes that are allocated, 0 where they are not known."""
    if _mallinfo is None:
        return 0
    information = _mallinfo()
    return int(information.uordblks + information.hblkhd)


def trim() -> None:
    """Return free memory to the system, as far as it is known how."""
    if _trim is not None:
        _trim(0)
