"""Tensors come from safetensors or PyTorch files, whole or sharded; any other file is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoint.files import open_folder, read_pickle
from model.folder import CheckpointError, SafetensorsFiles

A, B = torch.arange(6.0).reshape(2, 3), torch.ones(4)


def private_megabytes() -> float:
    """Return the MiB of anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) / 1024


def test_safetensors_are_preferred_and_shapes_need_no_reading(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model.safetensors")
    torch.save({"a": B}, tmp_path / "pytorch_model.bin")
    opened = open_folder(tmp_path)
    assert isinstance(opened, SafetensorsFiles)
    assert opened.shape("a") == (2, 3)
    assert torch.equal(opened["a"], A)


def test_shards_are_one_mapping(tmp_path: Path) -> None:
    torch.save({"a": A}, tmp_path / "one.bin")
    torch.save({"b": B}, tmp_path / "two.bin")
    index = {"weight_map": {"a": "one.bin", "b": "two.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    opened = open_folder(tmp_path)
    assert opened.keys() == {"a", "b"}
    assert torch.equal(opened["b"], B)


@pytest.mark.parametrize("zipped", [True, False], ids=["today", "before PyTorch 1.6"])
def test_both_of_torchs_formats_are_read(zipped: bool, tmp_path: Path) -> None:
    torch.save({"a": A}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_pickle(tmp_path / "x.pt")["a"], A)


def test_tensors_stay_mapped_to_their_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(16_000_000)}, tmp_path / "model.safetensors")
    torch.save({"b": torch.ones(16_000_000)}, tmp_path / "x.pt")
    before = private_megabytes()
    tensors = {**open_folder(tmp_path), **read_pickle(tmp_path / "x.pt")}
    assert sum(float(tensor.sum()) for tensor in tensors.values()) == 32_000_000
    assert private_megabytes() - before < 32, "64 MB of either file were copied"


@pytest.mark.parametrize("shard", ["../two.bin", "/etc/hostname", "absent.bin"])
def test_an_index_names_only_files_of_its_folder(shard: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save({"b": B}, tmp_path / "two.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"b": shard}}))
    with pytest.raises(CheckpointError, match=re.escape(repr(shard))):
        open_folder(folder)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([A], "holds a list, not a dictionary"),
        ({"a": A, "f": print}, "cannot be read as tensors and plain data alone"),
        (None, "is not a file"),
        (b"PK\x03\x04 and then nothing", "cannot be read as tensors and plain data alone"),
        (b"", "cannot be read as tensors and plain data alone"),
        (b"\x80\x02.", r"x\.pt cannot be read as tensors and plain data alone"),
        (b"\x80\x02X\x01\0\0\0\xff.", r"x\.pt cannot be read as tensors and plain data alone"),
    ],
)
def test_a_file_of_other_data_is_refused(content: Any, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=complaint):
        read_pickle(file)


def test_a_folder_without_weights_is_refused_with_the_expected_names(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none of model\.safetensors.*pytorch_model\.bin"):
        open_folder(tmp_path)


def test_more_than_tensors_in_a_folders_file_is_refused(tmp_path: Path) -> None:
    torch.save({"a": A, "epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="entries that are not tensors: epoch"):
        open_folder(tmp_path)
