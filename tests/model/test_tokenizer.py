"""The tokenizer of a model folder: a file that cannot be read is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.config import ConfigError
from model.prompt import PromptTokenizer, Text, encode, open_tokenizer
from tests.tiny_models import CONFIGS, prompt_tokenizer


@pytest.mark.parametrize("text", [None, "", "[]", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'])
def test_a_file_that_cannot_be_read_is_refused_by_name(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match=r"tokenizer\.json (cannot be read as a tokenizer|has no tokens)"):
        PromptTokenizer.load(tmp_path, CONFIGS["openflamingo"].prompt)


def test_truncation_and_padding_of_an_earlier_call_are_not_applied(tmp_path: Path) -> None:
    """Transformers writes them into the file, and resets them in each call."""
    whole = prompt_tokenizer()
    (tmp_path / "whole.json").write_text(whole.to_json())
    saved = open_tokenizer(tmp_path / "whole.json")
    saved.enable_truncation(2)
    saved.enable_padding(length=40)
    saved.save(str(tmp_path / "tokenizer.json"))
    loaded = PromptTokenizer.load(tmp_path, whole.prompt)
    assert encode([Text("abcdef")], loaded).token_ids == encode([Text("abcdef")], whole).token_ids
    assert '"truncation": null' in loaded.to_json().replace('":null', '": null')
