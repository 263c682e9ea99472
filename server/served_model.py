"""The served model: config and tokenizer of its folder, its name for clients, and its maximum context length.

This module does not load torch: the API process and the worker read the same folder, but only the worker reads its weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from model.config import ConfigError, FlamingoConfig, fingerprint, load_config
from model.hub.job import Origin, read_origin
from model.likeness import Likeness, load_likeness, unit
from model.prior import NEAREST_MEAN, Prior, load_prior
from model.prompt import PromptTokenizer
from server.limits.turns import ThreadTurns
from server.settings import Settings, SettingsError

# more concurrent texts would take processors from the worker
NUM_TOKENIZER_THREADS = 3
# long texts of one client leave a thread to all other clients
MAX_TEXTS_OF_CLIENT = 2
NO_ORIGIN = Origin()


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model in the API process, without weights."""

    name: str
    config: FlamingoConfig
    tokenizer: PromptTokenizer
    max_model_len: int
    # maps mean features to the vectors by which media are compared
    likeness: Likeness = unit
    # the methods of classification that are expected to be best
    prior: Prior = NEAREST_MEAN
    # identifies the folder's weights: stored results of the model are keyed by it
    fingerprint: str = ""
    origin: Origin = NO_ORIGIN
    # runs a function that encodes texts: a long text takes a second
    tokenize: ThreadTurns = field(
        default_factory=partial(ThreadTurns, NUM_TOKENIZER_THREADS, "tokenizer", max_of_client=MAX_TEXTS_OF_CLIENT),
        repr=False,
        compare=False,
    )

    @classmethod
    def load(cls, settings: Settings) -> ServedModel:
        """Read a model folder. Raises `SettingsError` if it is invalid, or if the settings do not fit the model."""
        if settings.model is None:
            raise SettingsError("model: a folder is required")
        folder = Path(settings.model)
        try:
            config = load_config(folder)
            tokenizer = PromptTokenizer.load(folder, config.prompt)
            weights, prior = fingerprint(folder), load_prior(folder)
            likeness = load_likeness(folder, config.vision.feature_dim)
        except (ConfigError, OSError) as error:
            raise SettingsError(f"model: {error}") from None
        return cls(
            name=settings.served_model_name or config.name,
            config=config,
            tokenizer=tokenizer,
            max_model_len=_max_model_len(config, settings),
            likeness=likeness,
            prior=prior,
            fingerprint=weights,
            origin=read_origin(folder),
        )


def _max_model_len(config: FlamingoConfig, settings: Settings) -> int:
    """Return the maximum tokens of a prompt with its answer: the model's limit, or a lower one from the settings.

    Raises `SettingsError` if the setting exceeds the model's limit.
    """
    limit = config.language_model.max_positions
    if settings.max_model_len is None:
        return limit
    if settings.max_model_len > limit:
        raise SettingsError(f"max_model_len: {settings.max_model_len} is more than the {limit} positions of the model")
    return settings.max_model_len
