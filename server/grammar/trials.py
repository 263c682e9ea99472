"""Runs the trial process: it is started ahead of its use, killed if it does not answer, and replaced when it has ended."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import msgspec

from model.prompt import PromptTokenizer
from server.grammar import GrammarError, TrialUnavailable
from server.grammar.compiler import Source
from server.grammar.refusals import NAMES
from server.grammar.trial import MAX_SECONDS, TOO_LARGE, Setup, Verdict, decode_verdict, encode
from server.settings import ROOT, child_environment
from server.signals import is_suspended
from server.wire import Grammar

# of the process
MODULE = "server.grammar.trial"
# seconds in which a loaded machine starts the process, or gives it the processor time of a grammar
WAIT_SECONDS = 30.0
# between looks at a process that does not answer, which may be suspended
LOOK_SECONDS = 0.5
# seconds in which a process ends after its connection is closed; then it is killed
END_SECONDS = 1.0
# a process that has ended for another reason than its grammar is replaced once
ATTEMPTS = 2
# what a grammar did to a process that ended by these signals
REASONS: dict[int, str] = {
    signal.SIGPROF: f"takes more than {MAX_SECONDS:g} seconds of processor time to compile",
    signal.SIGABRT: TOO_LARGE,
    signal.SIGSEGV: "is nested too deeply to be compiled",
}
# errors of a process that has ended, or does not answer
LOST = (EOFError, OSError, msgspec.DecodeError)

logger = logging.getLogger(__name__)


class Trials:
    """Tries grammars for one tokenizer, one at a time. The calling thread waits."""

    def __init__(self, tokenizer: PromptTokenizer) -> None:
        self._setup = encode(Setup(tokenizer=tokenizer.to_json(), eos_ids=tuple(tokenizer.eos_ids)))
        self._process: TrialProcess | None = None

    def start(self) -> TrialProcess:
        """Return the process, which is started unless it runs. Raises the errors of `LOST`."""
        if self._process is None or self._process.has_ended:
            self.stop()
            self._process = TrialProcess()
            self._process.exchange(self._setup)
        return self._process

    def check(self, grammar: Grammar) -> Source:
        """Return what is compiled for a grammar, with the bytes of memory that it holds then.

        Raises `GrammarError` for one that cannot be compiled within the limits, or `TrialUnavailable`.
        """
        for _ in range(ATTEMPTS):
            if (verdict := self._try(grammar)) is not None:
                break
        else:
            raise TrialUnavailable(
                f"this {NAMES[grammar.kind]} cannot be checked now: the server has too much other work"
            )
        if verdict.unexpected:
            logger.error("a grammar could not be compiled", extra={"kind": grammar.kind, "error": verdict.unexpected})
        if verdict.refusal:
            raise GrammarError(verdict.refusal, verdict.reason)
        return verdict.source

    def stop(self) -> None:
        if self._process is not None:
            self._process.end()
        self._process = None

    def _try(self, grammar: Grammar) -> Verdict | None:
        """Return the verdict on a grammar, None if the process has ended for another reason."""
        try:
            return decode_verdict.decode(self.start().exchange(encode(grammar)))
        except LOST as error:
            status = 0 if self._process is None else self._process.end()
            reason = REASONS.get(-status, "")
            extra = {"kind": grammar.kind, "status": status, "error": reason or type(error).__name__}
            logger.warning("a trial process of grammars was lost", extra=extra)
        return Verdict(refusal=f"this {NAMES[grammar.kind]} {reason}") if reason else None


class TrialProcess:
    """A process that answers messages, the first one when it is ready. It ends with this object at the latest."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            self._process = _start(theirs)
        self._end = weakref.finalize(self, _end, self._connection, self._process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def exchange(self, message: bytes) -> bytes:
        """Send a message and return the reply. Raises the errors of `LOST`, among them `TimeoutError`."""
        self._connection.send_bytes(message)
        deadline = time.monotonic() + WAIT_SECONDS
        while not self._connection.poll(LOOK_SECONDS):
            if is_suspended(self.pid) or time.monotonic() > deadline:
                raise TimeoutError
        return self._connection.recv_bytes()

    def end(self) -> int:
        """End the process, if it has not ended, and return its exit status, -N for signal N."""
        self._end()
        return self._process.wait()


def _end(connection: Connection, process: subprocess.Popen[bytes]) -> None:
    """Close the connection, which ends an idle process, and kill one that does not end."""
    connection.close()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _start(theirs: Connection) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env=child_environment(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1"),
        # an interrupt from the keyboard is for the server, which ends this process
        process_group=0,
    )
    if sys.platform == "linux":  # the worker's threads may be bound to cores, its parent's are not
        with suppress(OSError):
            os.sched_setaffinity(process.pid, os.sched_getaffinity(os.getppid()))
    return process
