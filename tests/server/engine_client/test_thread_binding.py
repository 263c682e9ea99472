"""The threads of a worker on a CPU are bound to a core each, unless it shares the cores or may use a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from server.engine_client import thread_binding
from server.engine_client.thread_binding import CONFIGURED, thread_variables
from server.settings import Settings

BOUND = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
SHOW_THREADS = """
import json, os, torch
product = torch.ones(999, 999) @ torch.ones(999, 999)
bound = [sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")]
print(json.dumps([torch.get_num_threads(), bound]))
"""


@pytest.fixture(autouse=True)
def _unconfigured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_binding, "GPU_FILES", ())
    monkeypatch.setattr(thread_binding, "_num_processors", lambda: 3)
    for name in [name for name in os.environ if name.startswith(CONFIGURED)]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({}, BOUND),
        ({"device": "cpu"}, BOUND),
        ({"device": "cuda"}, {}),
        ({"num_threads": 3}, BOUND),
        ({"num_threads": 2}, {}),
        ({"tensor_parallel": 2}, {}),
    ],
)
def test_threads_are_bound_if_they_have_all_cores_of_a_cpu(fields: dict[str, Any], variables: dict[str, str]) -> None:
    assert thread_variables(Settings(**fields)) == variables


def test_variables_of_the_operator_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_CPU_AFFINITY", "1 0")
    assert thread_variables(Settings()) == {}


def test_the_device_auto_may_be_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(thread_binding, "GPU_FILES", (str(tmp_path),))
    assert thread_variables(Settings()) == {}
    assert thread_variables(Settings(device="cpu")) == BOUND


@pytest.mark.skipif(sys.platform != "linux", reason="threads are bound on Linux")
def test_torch_binds_its_threads_and_has_as_many_as_before() -> None:
    def threads(**variables: str) -> tuple[int, list[tuple[int, ...]]]:
        script = [sys.executable, "-c", SHOW_THREADS]
        output = subprocess.run(script, env={**os.environ, **variables}, stdout=subprocess.PIPE, check=True).stdout
        number, cores = json.loads(output)
        return number, [tuple(of_thread) for of_thread in cores]

    number, cores = threads(**BOUND)
    assert number == threads()[0] <= len(cores)
    # each core is of one group, which all other threads inherit from the first one
    assert sum(map(len, set(cores))) == len(set(chain.from_iterable(cores)))
    assert len(set(cores)) == number
