"""The tokens that begin, end and pad a text are read from the settings files of old and new transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint.files import read_tokenizer
from model.config import ConfigError
from model.folder import CheckpointError

GOLDENS = Path(__file__).parents[2] / "goldens" / "openflamingo"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a tokenizer like LLaMA's, which writes <s> before every text."""
    shutil.copy(GOLDENS / "llama" / "language_model" / "tokenizer.json", tmp_path)
    return tmp_path


def write(folder: Path, **settings: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "special": True}], ids=["string", "object"])
def test_a_token_is_a_string_or_an_object(eos: Any, folder: Path) -> None:
    write(folder, eos_token=eos, bos_token="<s>", pad_token=None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<unk>", "unk_token": "<unk>"}))
    read = read_tokenizer(folder, {})
    assert (read.bos, read.eos, read.pad) == ("<s>", "</s>", "<unk>")
    assert read.pad_alone == ""


def test_the_models_configuration_fills_in(folder: Path) -> None:
    read = read_tokenizer(folder, {"bos_token_id": 1, "eos_token_id": 2})
    assert (read.bos, read.eos, read.pad) == ("<s>", "</s>", "")


@pytest.mark.parametrize(("adds_bos", "begin"), [(None, "<s>"), (True, "<s>"), (False, "")])
def test_a_text_begins_as_the_tokenizer_begins_it(adds_bos: bool | None, begin: str, folder: Path) -> None:
    write(folder, bos_token="<s>", add_bos_token=adds_bos)
    assert read_tokenizer(folder, {}).begin == begin


def test_new_tokens_come_last_and_old_ones_stay(folder: Path) -> None:
    read = read_tokenizer(folder, {})
    size = len(read)
    read.add(["</s>", "<image>", "<PAD>"])
    assert [read.tokenizer.token_to_id(token) for token in ("</s>", "<image>", "<PAD>")] == [2, size, size + 1]
    assert read.tokenizer.encode("a<image>b", add_special_tokens=False).tokens.count("<image>") == 1


@pytest.mark.parametrize("text", ["", "{}", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'])
def test_a_tokenizer_that_cannot_be_read_is_refused_by_name(text: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match=r"tokenizer\.json (cannot be read as a tokenizer|has no tokens)"):
        read_tokenizer(folder, {})


def test_settings_that_are_nested_too_deeply_are_refused_by_name(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not JSON"):
        read_tokenizer(folder, {})


@pytest.mark.parametrize("token_id", [-1, 2**70, None, "1"])
def test_ids_that_no_tokenizer_has_name_no_token(token_id: object, folder: Path) -> None:
    assert read_tokenizer(folder, {"eos_token_id": token_id}).eos == ""


def test_a_folder_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        read_tokenizer(tmp_path, {})
