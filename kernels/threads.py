"""Runs a compiled kernel on several of torch's threads, which can wait for each other between its parts.

The threads are those of the OpenMP runtime that torch loaded: its idle threads are still awake for the next product, and no
second pool of threads competes with them for the processors.
"""

from __future__ import annotations

import ctypes
import sys
from collections import namedtuple
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from kernels.compiled import OnDemand, compiled_for, inlined, intrinsic, numba, types

if numba is not None:
    from llvmlite import ir  # type: ignore[import-untyped]
    from numba.core import cgutils

wait_until: Any = None
take: Any = None
KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# A thread reads the counter this many times, for some ten microseconds, and then offers its processor to other programs: on
# a busy machine, the thread for which it waits may need the same processor. An offer may cost a time slice of milliseconds,
# so it is not made in the short waits of an idle machine. The loop does not contain the instruction `pause`, since a
# hypervisor may suspend a processor that repeats it
MAX_READS = 1 << 14


@cache
def _openmp() -> Callable[..., None] | None:
    if numba is None or sys.platform == "win32":
        return None
    symbols, needed = ctypes.CDLL(None), ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "sched_yield")
    if not all(hasattr(symbols, name) for name in needed):
        return None
    symbols.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    symbols.GOMP_parallel.restype = None
    return symbols.GOMP_parallel


def has_threads() -> bool:
    """Return whether torch's OpenMP runtime can run a kernel."""
    return _openmp() is not None


def run_on_threads(kernel: int, arguments: ctypes.Array[ctypes.c_int64], num_threads: int | None = None) -> None:
    """Call the kernel at an address, whose signature is "int64*", with these arguments in each thread, and wait for all.

    Without a number, all of torch's threads run it; without an OpenMP runtime, this one. The interpreter's lock is not held
    meanwhile.
    """
    run = _openmp()
    if run is None:
        KERNEL(kernel)(arguments)
    else:
        run(kernel, arguments, torch.get_num_threads() if num_threads is None else num_threads, 0)


def threaded(build: Callable[..., Callable[..., None]]) -> OnDemand[tuple[int, ...], int]:
    """Compile the kernels that a function builds, as `compiled_for` does; `kernel[16, 3]` is the address of one.

    Its only argument is the address of int64s.
    """
    kernels = compiled_for("int64*")(lambda has_runtime, *sizes: build(*sizes))

    def address(sizes: tuple[int, ...]) -> int:
        # a stored binary for a process with an OpenMP runtime differs from one for a process without
        entry = kernels[has_threads(), *sizes][torch.float32]  # of no element: all are called with int64s
        value = ctypes.cast(entry, ctypes.c_void_p).value  # type: ignore[arg-type]
        assert value is not None
        return value

    return OnDemand(address)


def indices(names: str) -> Any:
    """Return a named tuple of the index of each word: a kernel reads its arguments by name."""
    words = names.split()
    return namedtuple("Indices", words)(*range(len(words)))


def thread_functions() -> tuple[Any, Any]:
    """Return functions of compiled loops: the number of the thread, and of all threads."""
    if not has_threads():
        return inlined(lambda: 0), inlined(lambda: 1)
    return tuple(types.ExternalFunction(f"omp_get_{name}", types.int32()) for name in ("thread_num", "num_threads"))


@threaded
def _note_ids():
    thread_number, _ = thread_functions()
    thread_id = types.ExternalFunction("gettid", types.int32())

    def note(arguments):
        arguments[np.int64(thread_number())] = thread_id()

    return note


def thread_ids() -> list[int]:
    """Return the system's ids of the threads that run kernels, by their numbers in OpenMP; none if they are unknown."""
    if not has_threads() or not hasattr(ctypes.CDLL(None), "gettid"):
        return []
    numbers = (ctypes.c_int64 * torch.get_num_threads())()
    run_on_threads(_note_ids[()], numbers)
    return list(numbers)


@inlined
def share(count, thread, num_threads):
    """Return the first and the end of a thread's share of `count` items."""
    return count * thread // num_threads, count * (thread + 1) // num_threads


if numba is not None:

    @intrinsic
    def take(context, numbers, index):
        """Add 1 to an int64, and return its value before: threads that take one task after the other end together."""

        def generate(context, builder, signature, arguments):
            numbers, index = arguments
            return builder.atomic_rmw("add", builder.gep(numbers, [index]), ir.IntType(64)(1), "monotonic")

        return types.int64(numbers, index), generate

    @intrinsic
    def wait_until(context, counter, least):
        """Add 1 to an int64, and wait until it is at least `least`; what other threads wrote before is visible then."""

        def generate(context, builder, signature, arguments):
            if not has_threads():  # one thread waits for no other, and its system may have no `sched_yield`
                return context.get_dummy_value()
            counter, least = arguments
            int32, int64 = ir.IntType(32), ir.IntType(64)
            offer = cgutils.get_or_insert_function(builder.module, ir.FunctionType(int32, []), "sched_yield")
            num_reads = cgutils.alloca_once_value(builder, int32(0))
            builder.atomic_rmw("add", counter, int64(1), "acq_rel")
            read, wait = builder.append_basic_block("read"), builder.append_basic_block("wait")
            end = builder.append_basic_block("end")
            builder.branch(read)
            builder.position_at_end(read)
            is_reached = builder.icmp_signed(">=", builder.load_atomic(counter, "acquire", 8), least)
            builder.cbranch(is_reached, end, wait)
            builder.position_at_end(wait)
            count = builder.add(builder.load(num_reads), int32(1))
            builder.store(count, num_reads)
            with builder.if_then(
                builder.icmp_unsigned("==", builder.urem(count, int32(MAX_READS)), int32(0)), likely=False
            ):
                builder.call(offer, [])
            builder.branch(read)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(counter, least), generate
