"""The model as the server offers it: its folder's config and tokenizer, the name that clients use, and its longest prompt.

No torch: the API process and the worker read the same folder, and only the worker reads its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.config import FlamingoConfig, fingerprint, load_config
from model.tokenizer import PromptTokenizer
from server.settings import Settings, SettingsError


@dataclass(frozen=True, slots=True)
class ServedModel:
    name: str
    config: FlamingoConfig
    tokenizer: PromptTokenizer
    max_model_len: int
    # of the folder's weights: what is kept of the model's work is kept under it
    fingerprint: str = ""

    @classmethod
    def load(cls, settings: Settings) -> ServedModel:
        if settings.model is None:
            raise SettingsError("model: no folder was given")
        folder = Path(settings.model)
        config = load_config(folder)
        return cls(
            name=settings.served_model_name or config.name,
            config=config,
            tokenizer=PromptTokenizer.load(folder, config.prompt),
            max_model_len=longest(config, settings),
            fingerprint=fingerprint(folder),
        )

    @property
    def num_token_ids(self) -> int:
        return self.config.language_model.num_token_ids


def longest(config: FlamingoConfig, settings: Settings) -> int:
    """Tokens of a prompt with its answer: the model's own limit, or a lower one from the settings."""
    limit = config.language_model.max_positions
    if settings.max_model_len is None:
        return limit
    if settings.max_model_len > limit:
        raise SettingsError(f"max_model_len is {settings.max_model_len}, this model has {limit} positions")
    return settings.max_model_len
