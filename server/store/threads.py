"""Threads for calls that may block for ever, which do not keep the process from ending.

Python waits at its end for the threads of its own executors: a database that hangs would keep a server from ending.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

from server.limits.turns import REST, ThreadTurns

Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")
Call = tuple[Future[Any], Callable[[], Any]]


class Threads(Executor):
    """Runs calls in up to `max_threads` threads."""

    def __init__(self, max_threads: int, name: str) -> None:
        self._max_threads, self._name = max_threads, name
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._is_closed = False
        self._lock = threading.Lock()

    def submit(
        self, function: Callable[Parameters, Result], /, *arguments: Parameters.args, **named: Parameters.kwargs
    ) -> Future[Result]:
        """Queue a call. Raises `RuntimeError`, and never runs it, after `close` or if no thread can be started."""
        future: Future[Result] = Future()
        with self._lock:
            if self._is_closed:
                raise RuntimeError(f"the {self._name} takes no calls after shutdown")
            if len(self._threads) < self._max_threads:
                self._start_thread()
            self._calls.put((future, lambda: function(*arguments, **named)))
        return future

    def _start_thread(self) -> None:
        thread = threading.Thread(target=_work, args=(self._calls,), name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no more threads, but those that run will take the call
            if not self._threads:
                raise
        else:
            self._threads.append(thread)

    def close(self, seconds: float) -> None:
        """Cancel the calls that wait, and give those that run up to `seconds` to end."""
        with self._lock:
            self._is_closed = True
            with suppress(queue.Empty):
                while (call := self._calls.get_nowait()) is not None:
                    call[0].cancel()
            for _ in self._threads:
                self._calls.put(None)
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0.0))


class SharedThreads(ThreadTurns):
    """Up to `max_threads` threads, and `max_of_client` of them for each client. Clients take turns.

    After a long call a client pauses, unless `rest` is 0.
    """

    def __init__(self, max_threads: int, max_of_client: int, name: str, rest: float = REST) -> None:
        self._executor = Threads(max_threads, name)
        super().__init__(max_threads, name, max_of_client=max_of_client, rest=rest, create=lambda *_: self._executor)

    def close(self, seconds: float) -> None:
        """Do what `Threads.close` does."""
        self._executor.close(seconds)


def _work(calls: queue.SimpleQueue[Call | None]) -> None:
    while _run_next(calls):
        pass


def _run_next(calls: queue.SimpleQueue[Call | None]) -> bool:
    """Run the next call, and return whether there was one; a thread that waits holds nothing of the previous call."""
    if (call := calls.get()) is None:
        return False
    future, function = call
    if future.set_running_or_notify_cancel():
        try:
            result = function()
        except BaseException as error:  # whatever it is, the caller gets it
            future.set_exception(error)
        else:
            future.set_result(result)
    return True
