"""Binds each thread of a worker on a CPU to a core of its own.

Otherwise, next to a busy program, Linux may run two of them on one core, where each waits for the other for whole time
slices.
"""

from __future__ import annotations

import os
import sys

from server.settings import Settings, child_environment

# a system with one of these files has a GPU, which the device "auto" may select
GPU_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
# prefixes of the variables with which an operator, or Ray, has configured the OpenMP runtime
CONFIGURED = ("OMP_", "GOMP_", "KMP_")


def thread_variables(settings: Settings) -> dict[str, str]:
    """Return environment variables with which the OpenMP runtime of a worker binds its threads.

    There are none for a worker that may use a GPU, or that has fewer threads than there are processors: workers that share
    them would bind their threads to the same ones.
    """
    has_gpu = settings.device == "cuda" or (settings.device == "auto" and any(map(os.path.exists, GPU_FILES)))
    shares_cores = settings.num_threads not in (None, _num_processors()) or settings.tensor_parallel > 1
    if has_gpu or shares_cores or any(name.startswith(CONFIGURED) for name in child_environment()):
        return {}
    return {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}


def _num_processors() -> int | None:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
