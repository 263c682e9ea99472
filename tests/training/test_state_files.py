"""Tests of a checkpoint's tensors on disk: no code of its pickle is run, and an error of the library is one line."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from model.folder import CheckpointError
from training.distributed import World
from training.state_files import read_state, write_state


class Surprise:
    """An object that would write a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_state(tmp_path / "state", {"a": torch.arange(6.0), "b.step": torch.tensor(3.0)}, World())
    return tmp_path / "state"


def read(folder: Path, name: str = "a", size: int = 6) -> torch.Tensor:
    tensor = torch.zeros(size)
    read_state(folder, {name: tensor}, World())
    return tensor


def test_tensors_are_read_as_they_were_written(folder: Path) -> None:
    assert torch.equal(read(folder), torch.arange(6.0))


def test_code_in_the_metadata_of_a_checkpoint_is_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Surprise(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"^its metadata names io\.open, which no checkpoint"):
        read(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["Metadata", "MetadataIndex", "_MEM_FORMAT_ENCODING"])
def test_metadata_cannot_change_a_class(name: str, folder: Path) -> None:
    # the state of an object whose attributes are slots: no dictionary, and foo = 1
    state = b"N}X\x03\x00\x00\x00fooK\x01s\x86b."
    (folder / ".metadata").write_bytes(b"\x80\x02c" + f"{metadata.__name__}\n{name}\n".encode() + state)
    with pytest.raises(CheckpointError, match=r"^its metadata changes a class or a function$"):
        read(folder)
    assert not hasattr(getattr(metadata, name), "foo")


@pytest.mark.parametrize("path", ["../outside.distcp", "/etc/passwd", "..", "a/b.distcp"])
def test_metadata_cannot_name_a_file_outside_the_checkpoint(path: str, folder: Path) -> None:
    stored = pickle.loads((folder / ".metadata").read_bytes())
    for info in stored.storage_data.values():
        info.relative_path = path
    (folder / ".metadata").write_bytes(pickle.dumps(stored))
    with pytest.raises(CheckpointError, match=f"^its metadata names the file '{path}', which is none"):
        read(folder)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1])])
def test_metadata_of_another_kind_is_damage(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^.+$"):
        read(folder)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("share", [None, 0.0, 0.2])
def test_a_missing_or_truncated_file_is_damage(folder: Path, name: str, share: float | None) -> None:
    file = folder / name
    content = file.read_bytes()
    file.unlink()
    if share is not None:
        file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"^.+$"):
        read(folder)


def test_tensors_of_other_names_or_sizes_are_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^.*\bc\b.*$"):
        read(folder, "c")
    with pytest.raises(CheckpointError, match=r"^.*[Ss]ize.*$"):
        read(folder, size=7)


def test_an_interrupt_is_no_failure_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    monkeypatch.setattr(FileSystemWriter, "write_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_state(tmp_path / "state", {"a": torch.zeros(1)}, World())


def test_a_failure_to_write_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"^\S+/file/state cannot be written: .+$"):
        write_state(tmp_path / "file" / "state", {"a": torch.zeros(1)}, World())
