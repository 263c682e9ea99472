"""The tokenizer of a Hugging Face folder: `tokenizer.json`, and the tokens that begin, end and pad a text.

The settings files that name those tokens are read as data; no tokenizer class is needed or run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from model.folder import CheckpointError, read_json
from model.tokenizer import open_tokenizer

SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class FolderTokenizer:
    tokenizer: Tokenizer
    # "" if the folder names none
    bos: str
    eos: str
    unk: str
    pad: str
    # the token that the tokenizer itself writes before every text
    begin: str

    def add(self, tokens: Iterable[str]) -> None:
        """Append the special tokens that the vocabulary lacks, in this order."""
        new = [token for token in tokens if self.tokenizer.token_to_id(token) is None]
        self.tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new])

    def knows(self, token: str) -> bool:
        return self.tokenizer.token_to_id(token) is not None

    @property
    def pad_alone(self) -> str:
        """The padding token if it has no other meaning (it is then never an answer), else ""."""
        return "" if self.pad in (self.bos, self.eos, self.unk) else self.pad

    def __len__(self) -> int:
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))


def read_tokenizer(folder: Path, config: Mapping[str, Any]) -> FolderTokenizer:
    """Read the tokenizer. Raises `CheckpointError` and `ConfigError`.

    `config`, the folder's `config.json`, may have token ids that the tokenizer's files lack.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json (a fast tokenizer saves one)")
    tokenizer = open_tokenizer(file)
    settings: dict[str, Any] = {}
    for name in SETTINGS:
        values = read_json(folder / name) if (folder / name).is_file() else {}
        settings |= {key: value for key, value in values.items() if value is not None}
    bos = _token(tokenizer, settings, config, "bos")
    return FolderTokenizer(
        tokenizer=tokenizer,
        bos=bos,
        eos=_token(tokenizer, settings, config, "eos"),
        unk=_spelling(settings.get("unk_token")),
        pad=_spelling(settings.get("pad_token")),
        begin=_begin(tokenizer, settings, bos),
    )


def _token(tokenizer: Tokenizer, settings: Mapping[str, Any], config: Mapping[str, Any], kind: str) -> str:
    """Return the token that the tokenizer's settings name, else the one whose id is in the model's configuration."""
    spelling = _spelling(settings.get(f"{kind}_token"))
    if spelling and tokenizer.token_to_id(spelling) is not None:
        return spelling
    token_id = config.get(f"{kind}_token_id")
    return (tokenizer.id_to_token(token_id) or "") if isinstance(token_id, int) else ""


def _spelling(token: Any) -> str:
    """Return a token that is written as a string, or as an object with its content."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _begin(tokenizer: Tokenizer, settings: Mapping[str, Any], bos: str) -> str:
    if (adds_bos := settings.get("add_bos_token")) is not None:
        return bos if adds_bos else ""
    first = tokenizer.encode("").tokens[:1]
    return bos if first == [bos] else ""
