"""The cache of imported models: a folder of model folders, each of which is created once, by a separate process."""

from __future__ import annotations

import glob
import logging
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen
from types import FrameType
from typing import NoReturn

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]


def cache_folder(folder: Path | None = None) -> Path:
    """Return the absolute path of the cache: `folder`, or the default if it is None."""
    return Path.home() / ".cache" / "flamboyance" if folder is None else folder.absolute()


def is_ready(folder: Path) -> bool:
    """Return whether a model folder has been made."""
    # the folder is moved to its path when it is complete, so it is enough to check one file
    return (folder / "config.json").exists()


@contextmanager
def only_import(folder: Path) -> Iterator[None]:
    """Wait until no other process imports into the folder, and remove the files of an import that was killed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        for partial in folder.parent.glob(f".{glob.escape(folder.name)}-*"):
            shutil.rmtree(partial)
        yield


def run_import(module: str, *arguments: str, job: bytes = b"") -> CompletedProcess[bytes]:
    """Run `python -m module` with the job as its input, and return its status and output.

    Ctrl-C in a terminal reaches this process alone. An exception here, such as that of a signal, ends the import, which
    first removes what it has written.
    """
    command = [sys.executable, "-m", module, *arguments]
    with Popen(command, cwd=ROOT, stdin=PIPE, stdout=PIPE, process_group=0) as process:
        try:
            output, _ = process.communicate(job)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    return CompletedProcess(command, process.returncode, output)


def begin_import() -> None:
    """Prepare the process of an import: SIGTERM becomes an exception, and log lines are like those of the server."""
    signal.signal(signal.SIGTERM, _exit)
    line = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=line, datefmt="%H:%M:%S")


def _exit(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
