"""An import leaves a whole folder or none: after a kill, with two processes at once, and on another file system."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest

from model.cache import is_ready
from model.folder import save_folder
from model.hub import convert as convert_module
from model.hub.convert import convert
from model.hub.job import Idefics, Job, ModelFolder, Origin, Part, read_origin
from tests.tiny_models import CONFIGS, byte_tokenizer, tiny_model

ROOT = Path(__file__).resolve().parents[3]
ORIGIN = Origin(revision="main", parts=(Part("model", "me/model", "a" * 40, "mit"),))
# an import that stops while it writes the weights
STALLED = """
import sys, time
from model import folder
from model.hub import convert
def stall(*_):
    print("writing", flush=True)
    time.sleep(600)
folder._write_weights = stall
convert.main()
"""


def job_of(source: Path, folder: Path) -> Job:
    return Job(name="me/model", folder=str(folder), source=Idefics(folder=str(source)), origin=ORIGIN)


@pytest.mark.parametrize("name", ["model-1", "model[1]-1"])
def test_a_killed_import_leaves_nothing_that_is_served_or_kept(name: str, idefics: Path, tmp_path: Path) -> None:
    job = job_of(idefics, tmp_path / "cache" / name)
    with subprocess.Popen(
        [sys.executable, "-c", STALLED],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(job))
        process.stdin.close()
        assert process.stdout.readline() == b"writing\n"
        process.kill()
    (partial,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert (partial / "config.json").exists()
    assert not is_ready(Path(job.folder))
    convert(job)
    assert read_origin(Path(job.folder)) == ORIGIN
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [f".{name}.lock", name]


def test_two_imports_at_once_write_one_folder(idefics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(idefics, tmp_path / "cache" / "model-1")
    is_writing, may_finish = threading.Event(), threading.Event()
    original, writes = convert_module._write, []

    def write(*arguments: Any) -> None:
        writes.append(arguments)
        is_writing.set()
        assert may_finish.wait(60)
        original(*arguments)

    monkeypatch.setattr(convert_module, "_write", write)
    threads = [threading.Thread(target=convert, args=(job,)) for _ in range(2)]
    threads[0].start()
    assert is_writing.wait(60)
    threads[1].start()
    may_finish.set()
    for thread in threads:
        thread.join()
    assert len(writes) == 1
    assert is_ready(Path(job.folder))


def test_a_model_folder_is_copied_where_it_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, config = tmp_path / "uploaded", CONFIGS["flamingo"]
    save_folder(source, config, tiny_model(config).state_dict().items(), byte_tokenizer().to_str())

    def refuse(*_: object) -> NoReturn:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    folder = tmp_path / "cache" / "model-1"
    convert(Job(name="me/model", folder=str(folder), source=ModelFolder(folder=str(source)), origin=ORIGIN))
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() == (source / weights).read_bytes()
    assert not (folder / weights).samefile(source / weights)
