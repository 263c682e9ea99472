"""A profile of one decode step: the number of calls and the time of each torch operator, from torch's profiler.

The rest of the step is kernels that Numba compiles, the interpreter between calls, and the overhead of the profiler.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch.profiler import ProfilerActivity, profile

from bench.table import Cell
from server.engine.engine import Engine
from server.wire import Generate

NUM_SLOWEST = 5


def decode_step(engine: Engine, requests: Sequence[Generate], num_layers: int) -> dict[str, Cell]:
    """Profile a step in which all of these text-only requests decode; return the totals and the slowest operators."""
    for request in requests:
        engine.add(request)
    while engine.scheduler.waiting or any(s.num_output_tokens == 0 for s in engine.scheduler.running):
        engine.step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        engine.step()
    while engine.has_work():
        engine.step()
    calls, microseconds = Counter[str](), Counter[str]()
    for event in profiler.events() or []:
        if event.cpu_parent is None:
            calls[event.name] += 1
            microseconds[event.name] += round(event.cpu_time_total)
    slowest = [f"{name} {us / 1000:.2f} ms in {calls[name]}" for name, us in microseconds.most_common(NUM_SLOWEST)]
    count, milliseconds = sum(calls.values()), sum(microseconds.values()) / 1000
    return {
        "torch calls": f"{count} per step, {count / num_layers:.1f} per layer, {milliseconds:.2f} ms",
        "slowest": ", ".join(slowest),
    }
