"""Ends a run after its current step, with a checkpoint, when it is interrupted or terminated.

A scheduler sends SIGTERM to the job that it preempts and kills it after some seconds, or torchrun does so to its processes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """A signal ended the run, and its checkpoint is saved; `number` is that of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_status(interrupt: KeyboardInterrupt) -> int:
    """Return the exit status of a program that a signal ended, as a shell reports it."""
    return 128 + (interrupt.number if isinstance(interrupt, Stopped) else signal.SIGINT)


class StopSignal:
    """The signal after which a run is to end; `number` is 0 until it arrives."""

    def __init__(self) -> None:
        self.number = 0

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Keep the first signal. A second interrupt raises KeyboardInterrupt, which ends the run at once."""
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Receive SIGINT and SIGTERM while a run trains; a run in another thread than the main one receives none."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # a shell lets a program in the background ignore interrupts
    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, stop.receive) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
