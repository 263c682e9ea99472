"""The faked clock of the fault "clock jumps": the wall clock differs, and waits take the time that they should."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.faults.scenario import Skipped
from bench.faults.storage import JUMPS, _fake_clock, _set_clock

# The interpreter waits for its lock like this: a wait that ends at once makes threads take the lock from each other
# without pause. No function of Python's calls it by itself.
TIMED_WAIT = """
import ctypes, time

class Moment(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]

library = ctypes.CDLL(None)
attributes, condition, mutex = (ctypes.create_string_buffer(64) for _ in range(3))
library.pthread_condattr_init(attributes)
library.pthread_condattr_setclock(attributes, time.CLOCK_MONOTONIC)
library.pthread_cond_init(condition, attributes)
library.pthread_mutex_init(mutex, None)
library.pthread_mutex_lock(mutex)
end = time.monotonic_ns() + 50_000_000
moment = Moment(*divmod(end, 10**9))
while library.pthread_cond_timedwait(condition, mutex, ctypes.byref(moment)) == 0:
    pass  # woken without a reason, which is allowed
print(time.time(), time.monotonic_ns() >= end)
"""


@pytest.mark.parametrize("jump", JUMPS)
def test_a_timed_wait_is_not_cut_short_by_a_faked_clock(jump: str, tmp_path: Path) -> None:
    try:
        environment = _fake_clock(tmp_path)
    except Skipped as reason:
        pytest.skip(str(reason))
    _set_clock(tmp_path, jump)
    command = [sys.executable, "-c", TIMED_WAIT]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    now, has_waited = output.split()
    assert float(now) - time.time() == pytest.approx(int(jump), abs=3600)
    assert has_waited == "True"
