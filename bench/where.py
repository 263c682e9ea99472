"""Where a decode step goes: torch's operators, how many calls of each and for how long, as its profiler sees one step.

What is left of the step is the kernels that Numba compiles, the interpreter between calls, and the profiler's own cost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch.profiler import ProfilerActivity, profile

from bench.table import Cell
from server.engine.engine import Engine
from server.wire import Generate

MOST = 5


def decode_step(engine: Engine, requests: Sequence[Generate], num_layers: int) -> dict[str, Cell]:
    """One step of requests of text alone, after their prompts; those that take longest by name."""
    for request in requests:
        engine.add(request)
    for _ in range(2):
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
    slowest = [f"{name} {us / 1000:.2f} ms in {calls[name]}" for name, us in microseconds.most_common(MOST)]
    count = sum(calls.values())
    return {
        "torch calls": f"{count} a step, {count / num_layers:.1f} a layer, {sum(microseconds.values()) / 1000:.2f} ms",
        "longest": ", ".join(slowest),
    }
