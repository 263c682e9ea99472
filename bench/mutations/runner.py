"""Applies each patch to a copy of the repository and runs its tests there; the working tree is never changed.

A patch is killed if one of its tests fails or does not end in time; it survives if all of them pass.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, Literal
from unittest import mock

import pytest
import torch

from bench.mutations.patches import Patch

PASSED, FAILED = 0, 1
TIMED_OUT = 124
SOURCES = ("", "clients/python/src")
# what most tests load before they begin, which takes longer than most of them
LIBRARIES = ("torch", "numba", "timm", "PIL.Image", "sklearn", "sqlalchemy.orm", "hypothesis", "fastapi", "httpx")
# libraries with a pytest plugin are loaded too early for pytest to rewrite their assertions
OPTIONS = ("-x", "-q", "-rfE", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")

Outcome = Literal["killed", "survived", "broken"]


class RunError(RuntimeError):
    """The tests cannot judge any patch; the message says why."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run of tests: pytest's exit status, or `TIMED_OUT`, and its output."""

    status: int
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    patch: Patch
    outcome: Outcome
    by: str  # the test that failed, or why there is no verdict
    seconds: float


def tracked_files(root: Path) -> list[str]:
    """Return the files that git tracks, with the changes of the working tree. Raises `RunError` outside a checkout."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{root} is not a git checkout: {done.stderr.strip()}")
    return [name for name in done.stdout.split("\0") if name and (root / name).is_file()]


def copy(root: Path, files: Iterable[str], target: Path) -> None:
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name)


def run_patches(
    root: Path,
    files: Sequence[str],
    patches: Sequence[Patch],
    *,
    jobs: int,
    timeout: float,
    report: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run all patches, `jobs` at a time, each job in its own copy.

    Raises `RunError` if the tests fail without any patch, because all patches would then seem to be killed.
    """
    with TemporaryDirectory(prefix="mutations-") as folder, ThreadPoolExecutor(jobs) as executor:
        first, copies = Path(folder, "0"), SimpleQueue[Path]()
        copy(root, files, first)
        _run_unpatched(first, patches, timeout)
        # with the compiled code of the run without patches
        copied = [shutil.copytree(first, Path(folder, str(number))) for number in range(1, jobs)]
        for tree in (first, *copied):
            copies.put(tree)

        def run(patch: Patch) -> Result:
            tree = copies.get()
            try:
                result = run_patch(patch, tree, timeout)
            finally:
                copies.put(tree)
            report(result)
            return result

        return list(executor.map(run, patches))


def _run_unpatched(tree: Path, patches: Sequence[Patch], timeout: float) -> None:
    tests = list(dict.fromkeys(test for patch in patches for test in patch.tests))
    done = run_tests(tree, tests, timeout * len(tests), writes_bytecode=True)
    if done.status != PASSED:
        raise RunError(f"without any patch, the tests fail with status {done.status}:\n{done.output[-4000:]}")


def run_patch(patch: Patch, tree: Path, timeout: float) -> Result:
    started = time.monotonic()
    with _applied(patch, tree):
        done = run_tests(tree, patch.tests, timeout)
    outcome, by = judge(done)
    return Result(patch=patch, outcome=outcome, by=by, seconds=time.monotonic() - started)


def judge(done: Run) -> tuple[Outcome, str]:
    """Return the outcome of a patch: `broken` if the tests cannot be collected."""
    if done.status == PASSED:
        return "survived", ""
    if done.status == TIMED_OUT:
        return "killed", "a timeout"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.output, re.MULTILINE)
    name = failed[1] if failed else ""
    return ("killed", name) if done.status == FAILED else ("broken", f"pytest ended with status {done.status}: {name}")


@contextmanager
def _applied(patch: Patch, tree: Path) -> Iterator[None]:
    """Apply a patch to a copy, and restore the file afterwards with its modification time, on which .pyc files depend."""
    file = tree / patch.file
    before, status = file.read_bytes(), file.stat()
    file.write_text(patch.patched(tree), encoding="utf-8")
    try:
        yield
    finally:
        file.write_bytes(before)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def run_tests(tree: Path, tests: Sequence[str], timeout: float, *, writes_bytecode: bool = False) -> Run:
    """Run tests in a copy until the first one fails; processes that they started end with them.

    Without `writes_bytecode`, no compiled code of a patched file outlives the patch.
    """
    log = tree.with_name(f"{tree.name}.log")
    process = _processes().Process(target=_run_pytest, args=(tree, tests, log, writes_bytecode))
    process.start()
    assert process.pid is not None
    process.join(timeout)
    status = TIMED_OUT if process.exitcode is None else process.exitcode
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return Run(status, log.read_text(encoding="utf-8", errors="replace"))


@cache
def _processes() -> Any:
    """Return a context that starts processes with `LIBRARIES` loaded, but nothing of this repository."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    return context


def _run_pytest(tree: Path, tests: Sequence[str], log: Path, writes_bytecode: bool) -> None:
    """Run pytest as `python -m pytest` in the copy would, and end this process with its status."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(tree)
    sources = [str(tree / source) for source in SOURCES]
    sys.path[:0] = sources
    sys.dont_write_bytecode = not writes_bytecode
    torch.set_num_threads(1)  # as tests/conftest.py does for a torch that is not loaded yet
    inherited = {"PYTHONPATH": os.pathsep.join(sources), "PYTHONDONTWRITEBYTECODE": "" if writes_bytecode else "1"}
    for name in [name for name in sys.modules if name.partition(".")[0] == "bench"]:
        del sys.modules[name]  # of the working tree
    sys.modules["__main__"] = ModuleType("__main__")  # that of the command is not loaded by processes of the tests
    with mock.patch.dict("os.environ", inherited):
        status = pytest.main([*OPTIONS, *tests])
    sys.stdout.flush()
    os._exit(int(status))
