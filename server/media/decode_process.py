"""Runs a decode process: it is started on first use, killed when it fails, and replaced."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf

import msgspec

from server.errors import Unavailable
from server.media.decoder import LENGTH_BYTES, Decode, Frames, Refused, Setup, decode_reply, with_length
from server.run_queue import RunQueue
from server.settings import ROOT, child_environment
from server.signals import is_suspended, kill

# seconds for a process to start; the time limit of decoding begins afterwards, so that a slow start refuses no media
START_SECONDS = 60.0
# between looks at a process that does not answer, which may be suspended
LOOK_SECONDS = 0.5
# Bytes of a reply that may be unread: all of it. A reader that is paused, and then cancelled, would not see the end of the
# output, without which the process is never waited for.
MAX_UNREAD = 2**40
STOPPED = "the decode pool is stopped"
# errors for a process that ended, or sent an invalid reply
LOST = (OSError, asyncio.IncompleteReadError, msgspec.DecodeError)


class TookTooLong(Exception):
    """The process has used the processor time of a media item."""


class NotStarted(Exception):
    """The process could not be started, or ended before it was ready."""


class DecodeProcess:
    """Decodes one media item at a time.

    For each, it waits at most `timeout` seconds, in which even a loaded machine gives it the processor time of `setup`.
    """

    def __init__(self, setup: Setup, timeout: float) -> None:
        self._setup = setup
        self._timeout = timeout
        self._process: Process | None = None
        self._work_began = -inf
        self._run_queue: RunQueue | None = None
        self._is_stopped = False

    @property
    def pid(self) -> int | None:
        """The id of the running process, None before the first use and after a failure."""
        return None if self._process is None else self._process.pid

    def begin_work(self) -> None:
        """Measure the work on a media item from now on."""
        self._work_began = time.monotonic()
        if self._run_queue is not None:
            self._run_queue.take_wait()

    def seconds_of_work(self) -> float:
        """Return the seconds since `begin_work`, without those in which the process starts or waits for a processor.

        They include the time in which the bytes of the media item are read.
        """
        if self._run_queue is not None:
            self._work_began += self._run_queue.take_wait()
        return max(time.monotonic() - self._work_began, 0.0)

    async def decode(self, request: Decode) -> Frames | Refused:
        """Return the reply.

        Raises `TookTooLong`, `TimeoutError`, `NotStarted`, the errors of `LOST`, and `Unavailable` if it is stopped.

        A process that was idle may have died meanwhile, so if it is lost, the request is sent to a new one.
        """
        if self._process is not None:
            try:
                return await self._exchange(self._process, request)
            except TimeoutError:
                raise
            except LOST:
                pass
        if self._is_stopped:
            raise Unavailable(STOPPED)
        self._work_began = inf
        try:
            process = await self._start()
        finally:
            self.begin_work()
        return await self._exchange(process, request)

    async def stop(self) -> None:
        self._is_stopped = True
        if (process := self._process) is not None:
            self.kill()
            await process.wait()

    def kill(self) -> None:
        if self._process is not None:
            kill(self._process)
        self._process = None

    async def _start(self) -> Process:
        """Start a process and wait until it is ready. Raises `NotStarted` and `TimeoutError`."""
        try:
            process = await self._spawn()
            with self._kills_at_failure():
                async with asyncio.timeout(START_SECONDS):
                    _stdin(process).write(with_length(self._setup))
                    await _read(process)
        except TimeoutError:
            raise
        except LOST as error:
            raise NotStarted(str(error)) from None
        self._run_queue = RunQueue(process.pid)
        return process

    async def _spawn(self) -> Process:
        process = self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "server.media.decoder"),
            stdin=PIPE,
            stdout=PIPE,
            limit=MAX_UNREAD,
            cwd=ROOT,
            env=child_environment(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1"),
            # not in a new session: Linux divides the processors between sessions first, whatever the priorities
            process_group=0,
        )
        if self._is_stopped:  # meanwhile
            await self.stop()
            raise Unavailable(STOPPED)
        return process

    async def _exchange(self, process: Process, request: Decode) -> Frames | Refused:
        with self._kills_at_failure():
            async with asyncio.timeout(self._timeout):
                reply = asyncio.create_task(_reply(process, request))
                try:
                    while not (await asyncio.wait({reply}, timeout=LOOK_SECONDS))[0]:
                        if is_suspended(process.pid):
                            raise ConnectionError("the process is suspended")
                    return decode_reply.decode(await reply)
                except asyncio.IncompleteReadError:
                    if await process.wait() == -signal.SIGPROF:
                        raise TookTooLong from None
                    raise
                finally:
                    reply.cancel()

    @contextmanager
    def _kills_at_failure(self) -> Iterator[None]:
        """Kill the process at any failure or cancellation: its next reply could belong to this request."""
        try:
            yield
        except BaseException:
            self.kill()
            raise


async def _reply(process: Process, request: Decode) -> bytes:
    """Send a request and return the reply."""
    _stdin(process).write(with_length(request))
    await _stdin(process).drain()
    return await _read(process)


async def _read(process: Process) -> bytes:
    assert process.stdout is not None
    length = await process.stdout.readexactly(LENGTH_BYTES)
    return await process.stdout.readexactly(int.from_bytes(length, "little"))


def _stdin(process: Process) -> asyncio.StreamWriter:
    assert process.stdin is not None
    return process.stdin
