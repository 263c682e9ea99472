"""Refuses a second run into a folder while a first one writes there: they would delete and mix each other's checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from model.config import ConfigError

LOCK = ".lock"


@contextmanager
def only_run(out: Path, *, enabled: bool = True) -> Iterator[None]:
    """Raise `ConfigError` if another run has the folder; the first process of a run enables it.

    The operating system ends the lock with the process, so none is left behind.
    """
    if not enabled:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"another run writes to {out}: wait for its end, or change out") from None
    try:
        yield
    finally:
        lock.release()
