"""The time for which a process waits for a processor is that of the thread that waits longest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from server.run_queue import RunQueue

BUSY = "import os; os.sched_setaffinity(0, {int(os.environ['CPU'])}); print(flush=True)\nwhile True: pass"

pytestmark = pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's scheduler statistics")


@contextmanager
def busy(cpu: int, nice: int = 0) -> Iterator[int]:
    """Run a process that keeps a processor busy."""
    with subprocess.Popen(
        [sys.executable, "-c", f"import os; os.nice({nice})\n{BUSY}"],
        env={**os.environ, "CPU": str(cpu)},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


def test_a_process_on_a_busy_processor_waits() -> None:
    cpu = min(os.sched_getaffinity(0))
    with ExitStack() as stack:
        starved = stack.enter_context(busy(cpu, nice=15))
        for _ in range(3):
            stack.enter_context(busy(cpu))
        run_queue = RunQueue(starved)
        began = time.monotonic()
        time.sleep(2.0)
        waited, seconds = run_queue.take_wait(), time.monotonic() - began
        assert 0.7 * seconds < waited <= seconds + 0.5
        os.kill(starved, signal.SIGSTOP)
        while Path(f"/proc/{starved}/stat").read_text().rpartition(") ")[2][0] != "T":
            time.sleep(0.05)  # it is suspended when it has the processor again
        run_queue.take_wait()
        time.sleep(0.5)
        assert run_queue.take_wait() == 0.0, "a suspended process waits for no processor"


def test_an_idle_process_does_not_wait() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        time.sleep(0.5)
        run_queue = RunQueue(process.pid)
        time.sleep(0.5)
        assert run_queue.take_wait() < 0.3
        process.kill()
        process.wait()
        assert run_queue.take_wait() == 0.0, "the process has ended"
