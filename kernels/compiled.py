"""Kernels for a CPU: plain loops in Python that Numba compiles, called with the addresses of tensors.

An operator of torch has an overhead of microseconds, and a layer that decodes few rows consists of dozens of operators. A
call of a kernel here takes half a microsecond. A kernel is compiled once per dtype, on first use, and cached on disk.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

try:
    import numba
    from numba import types
    from numba.core.caching import FunctionCache
    from numba.core.ccallback import CFunc
    from numba.core.registry import cpu_target
    from numba.extending import intrinsic, overload
except ImportError:  # no wheel for this platform: torch serves
    numba = types = cpu_target = intrinsic = overload = None

__all__ = ["cpu_target", "intrinsic", "numba", "types"]

Entry = Callable[..., None]
Key = TypeVar("Key")
Value = TypeVar("Value")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


# To find out whether a cached binary is stale, Numba checks only the kernel's own file, not those of inlined parts. So a
# digest of all sources is part of the kernel's name
SOURCES = sorted(Path(__file__).parent.glob("*.py"))
DIGEST = _digest(b"".join(file.read_bytes() for file in SOURCES))
# Sums may be in any order, so that loops can be vectorised; a NaN stays a NaN. A loop whose output begins less than 256
# bytes after its input is not vectorised, and may round differently. So rows of fewer bytes may differ by one unit in the
# last place from run to run. No published model has such rows
OPTIONS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy"}
# a bfloat16 is the upper half of a float32
ELEMENTS = {torch.float32: "float32", torch.bfloat16: "uint16"}
DTYPES = tuple(ELEMENTS)
ARGUMENTS = {"int": ctypes.c_int64, "float": ctypes.c_float}
NUMBERS = {"int": "int64", "float": "float32"}


class OnDemand(dict[Key, Value]):
    """Values that are built on first use: `kernel[x.dtype](x.data_ptr(), ...)` compiles the kernel for a dtype once."""

    def __init__(self, build: Callable[[Key], Value]) -> None:
        super().__init__()
        self._build = build

    def __missing__(self, key: Key) -> Value:
        self[key] = self._build(key)
        return self[key]


Compiled: TypeAlias = OnDemand[torch.dtype, Entry]


def compiled(signature: str) -> Callable[[Callable[..., None]], Compiled]:
    """Compile a function with one word of `signature` per argument; the caller must pass addresses of the right tensors.

    "T*" is the address of elements of the kernel's dtype; "float32*", "int32*" and "int64*" are addresses of such numbers;
    "int" and "float" are numbers.
    """
    return lambda function: OnDemand(partial(_entry, function, signature.split()))


def compiled_for(signature: str) -> Callable[[Callable[..., Callable[..., None]]], OnDemand[tuple[int, ...], Compiled]]:
    """Compile, as `compiled` does, the kernel that a function builds for sizes that are constants in it.

    `kernel[16, 3][x.dtype](...)` calls it. Loops of a known length are unrolled, which makes short loops that run once per
    key several times faster.
    """

    def build_for(build: Callable[..., Callable[..., None]], sizes: tuple[int, ...]) -> Compiled:
        function = build(*sizes)
        function.__name__ = "_".join(map(str, (function.__name__, *sizes)))
        return compiled(signature)(function)

    return lambda build: OnDemand(partial(build_for, build))


def _entry(function: Callable[..., None], signature: list[str], dtype: torch.dtype) -> Entry:
    address = _compile(function, types.void(*(_argument(kind, dtype) for kind in signature))).address
    # holding the interpreter's lock costs less than releasing it for a microsecond
    kinds: list[Any] = [ARGUMENTS.get(kind, ctypes.c_void_p) for kind in signature]
    return ctypes.PYFUNCTYPE(None, *kinds)(address)


def inlined(function: Any) -> Any:
    """Mark a part of a kernel as inlined: arguments that are constant at the call are constants in it."""
    return function if numba is None else numba.njit(forceinline=True, **OPTIONS)(function)


def pointer_to(element: str) -> Any:
    """Return a function of compiled loops that makes an int64 the address of elements of this type of Numba."""
    if numba is None:
        return None
    pointer = types.CPointer(getattr(types, element))

    @intrinsic
    def pointer_at(context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(address), generate

    return pointer_at


uint8s, int32s, int64s, float32s, bfloat16s = map(pointer_to, ("uint8", "int32", "int64", "float32", "uint16"))


def pointer_to_dtype(dtype_number: int) -> Any:
    """Return `pointer_to` for the elements of a tensor, whose dtype is this one of `DTYPES`."""
    return pointer_to(ELEMENTS[DTYPES[dtype_number]])


def _argument(kind: str, dtype: torch.dtype) -> Any:
    if not kind.endswith("*"):
        return getattr(types, NUMBERS[kind])
    return types.CPointer(getattr(types, ELEMENTS[dtype] if kind == "T*" else kind[:-1]))


def _compile(function: Callable[..., None], signature: Any) -> Any:
    """Compile a function for the types of its arguments, or load its binary.

    Its name contains everything that distinguishes it, also the processor, since machines may share the folder. Numba
    numbers the binaries of one name, and two processes that compile at the same time could give two binaries the same
    number, so that the wrong one would be loaded.
    """
    processor = cpu_target.target_context.codegen().magic_tuple()
    function.__qualname__ = f"{function.__name__}_{_digest(repr((signature, processor)).encode())}_{DIGEST}"
    kernel = _kernel(function, signature)
    try:
        kernel._cache = NamedCache(function)
        kernel.compile()
    except (RuntimeError, OSError):  # the cache folder cannot be written, or its disk is full
        kernel = _kernel(function, signature)
        kernel.compile()
    return kernel


def _kernel(function: Callable[..., None], signature: Any) -> Any:
    return CFunc(function, (signature.args, signature.return_type), {}, OPTIONS)


def load(pointer, index):
    """Return an element as float32."""


def store(pointer, index, value):
    """Store a float32 as an element, rounded to nearest even."""


@inlined
def exp(x):
    """Return e^x of a float32, written out so that loops over it are vectorised.

    It is 0 below e^-60, where products would become denormal and slow.
    """
    # 2^n e^r with |r| <= ln 2 / 2, and the series of e^r; ln 2 in two parts, so that r keeps its last bits
    is_nothing = x < np.float32(-60.0)
    x = np.float32(-60.0) if is_nothing else x  # a NaN is not less
    x = np.float32(88.0) if x > np.float32(88.0) else x
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    series = np.float32(1 / 720) * r + np.float32(1 / 120)
    for coefficient in (1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        series = series * r + np.float32(coefficient)
    power = np.int32(np.int32(n) + np.int32(127))
    power_of_two = np.int32(power << np.int32(23)).view(np.float32)
    return np.float32(0.0) if is_nothing else series * power_of_two


@inlined
def swapped(bits):
    """Return the bits with the order of negative numbers reversed."""
    return np.int32(bits ^ np.int32((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@inlined
def ordered_bits(value):
    """Return an int32 that compares like the float32; without special cases for NaN, loops can be vectorised."""
    return swapped(np.float32(value).view(np.int32))


@inlined
def from_ordered_bits(bits):
    return np.int32(swapped(bits)).view(np.float32)


if numba is not None:

    class NamedCache(FunctionCache):  # type: ignore[misc]
        """The binaries on disk of a kernel that has a name of its own.

        Numba's key of a binary contains the parts of a kernel, whose pickles differ between processes.
        """

        def _index_key(self, signature: Any, codegen: Any) -> Any:
            return signature, codegen.magic_tuple()

    @overload(load, jit_options=OPTIONS)
    def _load(pointer, index):
        if pointer.dtype == types.float32:
            return lambda pointer, index: pointer[index]
        return lambda pointer, index: np.uint32(np.uint32(pointer[index]) << np.uint32(16)).view(np.float32)

    @overload(store, jit_options=OPTIONS)
    def _store(pointer, index, value):
        def store_float32(pointer, index, value):
            pointer[index] = value

        def store_bfloat16(pointer, index, value):
            bits = np.float32(value).view(np.uint32)
            up = np.uint32(np.uint32(0x7FFF) + (np.uint32(bits >> np.uint32(16)) & np.uint32(1)))
            rounded = np.uint32(np.uint32(bits + up) >> np.uint32(16))
            is_nan = value != value
            pointer[index] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)

        return store_float32 if pointer.dtype == types.float32 else store_bfloat16
