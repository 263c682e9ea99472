"""The threads of a step: if some wait for their processors, steps have fewer for a while."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.threads import has_threads, thread_ids
from model.ranks import Rank
from server.engine import build
from server.engine.device.step_threads import LONGEST_PAUSE, LOOK_SECONDS, PAUSE_PER_LOOK, StepThreads, schedule_files
from tests.engine_client import CONFIG, Prompt, client

NUM_THREADS = 4
STEP_SECONDS = 1.1 * NUM_THREADS * LOOK_SECONDS  # the threads are looked at after each step
PAUSE = PAUSE_PER_LOOK * STEP_SECONDS
QUIET, ALL = [0.1, 0.1, 0.1, 0.1], [0.7, 0.7, 0.7, 0.7]
FIRST, THIRD, LAST = [0.9, 0.1, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.1, 0.7]


@pytest.fixture
def torch_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers to which torch's threads are set, the first one from the beginning."""
    numbers = [NUM_THREADS]
    monkeypatch.setattr(torch, "get_num_threads", lambda: numbers[-1])
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    return numbers


class Machine:
    """A clock, and the files of threads."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.files = [folder / str(number) for number in range(NUM_THREADS)]
        self._waits = [0.0] * NUM_THREADS
        self.pass_time(0.0, QUIET)
        self.threads = StepThreads(lambda: list(self.files), clock=lambda: self.now)

    def pass_time(self, seconds: float, shares: list[float]) -> None:
        """Let each thread wait in a share of this time."""
        self.now += seconds
        self._waits = [wait + share * seconds for wait, share in zip(self._waits, shares, strict=True)]
        for file, wait in zip(self.files, self._waits, strict=True):
            file.write_text(f"123456789 {round(wait * 1e9)} 42\n")

    def step(self, shares: list[float], seconds: float = STEP_SECONDS) -> int:
        """Run a step, and return the number of its threads."""
        with self.threads:
            number = torch.get_num_threads()
            self.pass_time(seconds, shares)
        return number


@pytest.fixture
def machine(tmp_path: Path, torch_threads: list[int]) -> Machine:
    return Machine(tmp_path)


def test_threads_that_wait_are_left_out_and_tried_again(machine: Machine) -> None:
    assert [machine.step(shares) for shares in (QUIET, QUIET, THIRD, QUIET)] == [4, 4, 4, 3]
    machine.now += PAUSE
    assert [machine.step(shares) for shares in (QUIET, QUIET)] == [4, 4]


def test_the_number_is_set_only_when_it_changes(machine: Machine, torch_threads: list[int]) -> None:
    """To set it, torch ends and starts threads."""
    for shares in (QUIET, QUIET, THIRD, QUIET, QUIET, QUIET):
        machine.step(shares)
    assert torch_threads == [4, 3]


def test_half_of_the_threads_stay(machine: Machine) -> None:
    assert [machine.step(shares) for shares in (QUIET, ALL, QUIET)] == [4, 4, 2]
    machine.threads.number = machine.threads.num_all = 3
    machine.threads._until = -inf
    machine.step(ALL)
    assert machine.threads.number == 2


def test_all_threads_run_if_fewer_wait_as_well(machine: Machine) -> None:
    """Next to a program with as many threads, or one that is bound to the processor of a thread that stays."""
    assert [machine.step(shares) for shares in (QUIET, ALL, ALL, ALL)] == [4, 4, 2, 4]
    began = machine.now
    while machine.step(ALL) == NUM_THREADS:
        pass
    assert machine.now - began == pytest.approx(LONGEST_PAUSE, abs=2 * STEP_SECONDS)


def test_the_first_thread_may_wait(machine: Machine) -> None:
    """It runs every step: without the others, it would wait as long."""
    assert [machine.step(FIRST) for _ in range(4)] == [4] * 4


def test_the_pause_doubles_while_threads_still_wait(machine: Machine) -> None:
    pauses = []
    machine.step(QUIET)
    for _ in range(6):
        machine.step(THIRD)
        began = machine.now
        while machine.step(QUIET, seconds=0.005) < NUM_THREADS:
            pass
        pauses.append(machine.now - began)
    assert pauses == pytest.approx([PAUSE, PAUSE, PAUSE, 0.8, LONGEST_PAUSE, LONGEST_PAUSE], abs=0.07)
    assert [machine.step(shares) for shares in (QUIET, THIRD, QUIET)] == [4, 4, 3]
    machine.now += PAUSE
    assert machine.step(QUIET) == 4


def test_waits_of_short_steps_are_added_up(machine: Machine) -> None:
    short = STEP_SECONDS / 3
    assert [machine.step(THIRD, short) for _ in range(5)] == [4, 4, 4, 3, 3]


def test_the_time_between_steps_does_not_count(machine: Machine) -> None:
    short, numbers = STEP_SECONDS / 3, list[int]()
    for _ in range(5):
        numbers.append(machine.step(THIRD, short))
        machine.pass_time(1.0 if machine.threads.number == NUM_THREADS else 0.01, [0.0] * NUM_THREADS)
    assert numbers == [4, 4, 4, 3, 3]


def test_a_trial_takes_a_tenth_of_the_time(machine: Machine) -> None:
    """A model may have steps of seconds."""
    assert [machine.step(LAST, 2.0) for _ in range(12)] == [4, *[3] * 10, 4]


def test_a_trial_of_fewer_threads_takes_a_tenth_of_the_time_as_well(machine: Machine) -> None:
    assert [machine.step(ALL, 2.0) for _ in range(14)] == [4, 2, *[4] * 10, 2, 4]


def test_a_thread_that_has_ended_is_replaced(machine: Machine) -> None:
    """The OpenMP runtime ends threads, and other ones take their numbers."""
    machine.step(QUIET)
    machine.files[3].unlink()
    machine.files[3] = machine.files[3].with_name("new")
    assert [machine.step(shares) for shares in (THIRD, THIRD, QUIET)] == [4, 4, 3]


def test_after_a_thread_has_ended_threads_may_be_left_out_at_once(machine: Machine) -> None:
    """The pause belongs to the threads before."""
    assert [machine.step(shares, 2.0) for shares in (THIRD, QUIET)] == [4, 3]
    machine.files[1].unlink()
    machine.files[1] = machine.files[1].with_name("new")
    assert [machine.step(shares, 2.0) for shares in (QUIET, THIRD, QUIET)] == [3, 4, 3]


def test_without_files_any_more_all_threads_run(machine: Machine) -> None:
    machine.step(THIRD)
    assert machine.step(QUIET) == 3
    machine.threads._find_files = tuple
    machine.files[0].rename(machine.files[0].with_name("gone"))
    assert [machine.step(THIRD) for _ in range(3)] == [3, 4, 4]


def test_without_files_the_number_stays(machine: Machine) -> None:
    machine.threads = StepThreads(clock=lambda: machine.now)
    assert [machine.step(ALL) for _ in range(3)] == [4, 4, 4]


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


needs_linux = pytest.mark.skipif(sys.platform != "linux" or not has_threads(), reason="only Linux has these files")


@needs_linux
def test_each_thread_has_a_file(four_threads: None) -> None:
    files = schedule_files()
    assert len(set(files)) == 4
    for file in files:
        assert len(file.read_text().split()) == 3
    torch.set_num_threads(1)
    assert schedule_files() == []


@needs_linux
def test_threads_that_the_runtime_has_ended_are_looked_for_again(four_threads: None) -> None:
    now = 0.0
    threads = StepThreads(schedule_files, clock=lambda: now)
    for number, until in ((2, inf), (2, inf), (2, -inf), (4, -inf)):
        threads.number, threads._until = number, until
        with threads:
            assert len(set(thread_ids())) == (2 if until == inf else 4)  # which ends or starts threads
            now += 1.0
    assert all(file.exists() for file in threads._files)


def test_steps_and_side_tasks_run_in_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, in_block, seen = client("flamingo", CONFIG), False, list[bool]()

    class Noted(StepThreads):
        def __enter__(self) -> None:
            nonlocal in_block
            in_block = True

        def __exit__(self, *_: object) -> None:
            nonlocal in_block
            in_block = False

    answer.engine.threads = Noted()

    def noted(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            seen.append(in_block)
            return method(*values)

        return run

    for name in ("_launch", "_run_side_work"):
        monkeypatch.setattr(answer.engine, name, noted(getattr(answer.engine, name)))
    answer.engine.add(Prompt(((0, 9),)).request("a"))
    answer.run()
    assert seen
    assert all(seen)


@needs_linux
def test_only_the_threads_of_a_model_on_one_cpu_are_looked_at(four_threads: None) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert len(build._step_threads(cpu, Rank(0, 1))._files) == 4
    assert not build._step_threads(gpu, Rank(0, 1))._files
    assert not build._step_threads(cpu, Rank(0, 2))._files
