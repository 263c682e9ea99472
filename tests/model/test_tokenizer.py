"""The tokenizer of a model folder: a file that cannot be read is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.config import ConfigError
from model.prompt import PromptTokenizer
from tests.tiny_models import CONFIGS


@pytest.mark.parametrize("text", [None, "", "[]", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'])
def test_a_file_that_cannot_be_read_is_refused_by_name(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match=r"tokenizer\.json (cannot be read as a tokenizer|has no tokens)"):
        PromptTokenizer.load(tmp_path, CONFIGS["openflamingo"].prompt)
