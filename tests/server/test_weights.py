"""The digests of the weights are those of the files, come after the start, and leave no process when they are cancelled."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import sys
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from bench.target import command_of
from server import file_digests, weights
from server.weights import Weights

pytestmark = pytest.mark.anyio
CONTENTS = {"model-1.safetensors": b"first", "model-2.safetensors": b"second" * 2**20}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {**CONTENTS, "config.json": b"{}"}.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def described(*digests: str | None) -> list[dict[str, object]]:
    files = zip(CONTENTS.items(), digests, strict=True)
    return [{"file": name, "bytes": len(content), "sha256": digest} for (name, content), digest in files]


async def test_each_file_has_its_digest(folder: Path) -> None:
    subject = Weights(folder)
    await subject.compute(lambda: True)
    assert subject.describe() == described(*(hashlib.sha256(content).hexdigest() for content in CONTENTS.values()))


async def test_nothing_is_read_before_the_engine_is_ready(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "POLL_SECONDS", 0.01)
    subject, answers = Weights(folder), iter([False, False, True])
    states = []

    def is_ready() -> bool:
        states.append(subject.describe())
        return next(answers)

    await subject.compute(is_ready)
    assert states == [described(None, None)] * 3
    assert all(file["sha256"] for file in subject.describe())


async def test_a_file_that_cannot_be_read_has_no_digest(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    subject = Weights(folder)
    (folder / "model-2.safetensors").unlink()
    await subject.compute(lambda: True)
    assert subject.describe() == described(hashlib.sha256(b"first").hexdigest(), None)
    assert "model-2.safetensors" in capfd.readouterr().err


async def test_without_file_descriptors_one_line_says_that_digests_are_unknown(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def spawn(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(asyncio, "create_subprocess_exec", spawn)
    subject = Weights(folder)
    await subject.compute(lambda: True)
    assert subject.describe() == described(None, None)
    (record,) = caplog.records
    assert (record.exc_info, "Too many open files" in record.__dict__["error"]) == (None, True)


async def test_a_cancelled_computation_leaves_no_process(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")  # without a writer, reading it does not end
    computation = asyncio.create_task(Weights(tmp_path).compute(lambda: True))
    async with asyncio.timeout(30):
        while not (processes := digesting(tmp_path)):
            await asyncio.sleep(0.02)
    computation.cancel()
    await asyncio.gather(computation, return_exceptions=True)
    assert not any(process.is_running() for process in processes)


def digesting(folder: Path) -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if str(folder / "model.safetensors") in command_of(child)]


async def test_without_a_folder_there_are_no_files() -> None:
    assert Weights(None).describe() == []


async def test_the_digests_are_computed_at_the_lowest_priority(folder: Path) -> None:
    code = f"import os, sys; from {file_digests.__name__} import main; main(sys.argv[1:]); print(os.nice(0))"
    command = [sys.executable, "-c", code, str(folder / "model-1.safetensors")]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert output.split() == [hashlib.sha256(b"first").hexdigest().encode(), b"19"]
