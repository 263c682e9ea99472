"""The threads of a step: those that wait for their processors are left out for a while, and tried again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from kernels.threads import has_threads, thread_ids
from server.engine.device import step_threads
from server.engine.device.step_threads import FIRST_PAUSE, LONGEST_PAUSE, LOOK_SECONDS, StepThreads, schedule_files

STEP_SECONDS = 1.1 * LOOK_SECONDS


class Machine:
    """A clock and the files of threads, with steps after each of which the threads are looked at."""

    def __init__(self, folder: Path, number: int) -> None:
        self.now, self.used = 0.0, list[int]()
        self.files = [folder / str(index) for index in range(number)]
        self.waits = [0.0] * number
        self._write()

    def step(self, threads: StepThreads, shares: list[float]) -> None:
        """Run a step in which each thread waits for a share of the time."""
        with threads:
            self.now += STEP_SECONDS
            self.waits = [wait + share * STEP_SECONDS for wait, share in zip(self.waits, shares, strict=True)]
            self._write()

    def _write(self) -> None:
        for file, wait in zip(self.files, self.waits, strict=True):
            file.write_text(f"123456789 {round(wait * 1e9)} 42\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    return Machine(tmp_path, 4)


def watched(machine: Machine) -> StepThreads:
    return StepThreads(machine.files, clock=lambda: machine.now, use=machine.used.append)


def test_threads_that_wait_are_left_out_and_tried_again(machine: Machine) -> None:
    threads = watched(machine)
    machine.step(threads, [0.1, 0.1, 0.1, 0.1])
    assert (threads.number, machine.used) == (4, [])
    machine.step(threads, [0.1, 0.1, 0.7, 0.1])
    assert (threads.number, machine.used) == (3, [3])
    machine.now += FIRST_PAUSE - 2 * STEP_SECONDS
    machine.step(threads, [0.1, 0.1, 0.1, 0.0])
    assert threads.number == 3
    machine.now += STEP_SECONDS
    machine.step(threads, [0.1] * 4)
    assert (threads.number, machine.used) == (4, [3, 4])


def test_at_most_half_of_the_threads_are_left_out_at_once(machine: Machine) -> None:
    """Next to a program with as many threads, all wait: one thread would be slower than all of them."""
    threads = watched(machine)
    numbers = []
    for shares in ([0.7] * 4, [0.7, 0.7, 0.0, 0.0], [0.7, 0.0, 0.0, 0.0]):
        machine.step(threads, shares)
        numbers.append(threads.number)
    assert numbers == [2, 1, 1]


def test_the_first_thread_may_wait(machine: Machine) -> None:
    """It computes every step: without the others, it would wait as long."""
    threads = watched(machine)
    machine.step(threads, [0.9, 0.1, 0.1, 0.1])
    assert threads.number == 4


def test_the_pause_doubles_while_threads_still_wait(machine: Machine) -> None:
    threads = watched(machine)
    pauses = []
    for _ in range(6):
        machine.step(threads, [0.1, 0.1, 0.1, 0.7])
        began = machine.now
        while threads.number < 4:
            machine.now += 0.01
            with threads:
                pass
        pauses.append(machine.now - began)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, LONGEST_PAUSE, LONGEST_PAUSE], abs=0.02)
    machine.step(threads, [0.1] * 4)
    machine.step(threads, [0.1, 0.1, 0.1, 0.7])
    machine.now += FIRST_PAUSE
    machine.step(threads, [0.1] * 4)
    assert threads.number == 4


def test_short_steps_are_looked_at_together(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = watched(machine)
    monkeypatch.setattr(step_threads, "LOOK_SECONDS", 2.5 * STEP_SECONDS)
    numbers = []
    for _ in range(3):
        machine.step(threads, [0.1, 0.1, 0.1, 0.7])
        numbers.append(threads.number)
    assert numbers == [4, 4, 3]


def test_without_files_the_number_stays(machine: Machine) -> None:
    threads = StepThreads((), clock=lambda: machine.now, use=machine.used.append)
    machine.step(threads, [0.9] * 4)
    assert (threads.number, machine.used) == (4, [])


@pytest.mark.skipif(sys.platform != "linux" or not has_threads(), reason="only Linux has these files")
@pytest.mark.parametrize("number", [1, 3])
def test_each_thread_has_a_file(number: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        numbers, files = thread_ids(), schedule_files()
    finally:
        torch.set_num_threads(before)
    assert numbers[0] == os.getpid() or Path(f"/proc/self/task/{numbers[0]}").exists()
    assert len(set(numbers)) == number
    assert len(files) == (number if number > 1 else 0)
    StepThreads(files, use=lambda _: None).use_all()
