"""The served model: config and tokenizer of its folder, its name for clients, and its maximum context length.

This module does not load torch: the API process and the worker read the same folder, only the worker reads its weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from model.config import FlamingoConfig, fingerprint, load_config
from model.hub.job import Origin, read_origin
from model.prompt import PromptTokenizer
from server.settings import Settings, SettingsError

# more texts at a time would take the processors from the worker
NUM_TOKENIZER_THREADS = 2
NO_ORIGIN = Origin()

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model as the API process knows it: without weights."""

    name: str
    config: FlamingoConfig
    tokenizer: PromptTokenizer
    max_model_len: int
    # identifies the folder's weights: stored results of the model are keyed by it
    fingerprint: str = ""
    origin: Origin = NO_ORIGIN
    _threads: Executor = field(
        default_factory=lambda: ThreadPoolExecutor(NUM_TOKENIZER_THREADS, thread_name_prefix="tokenizer"), repr=False
    )

    async def tokenize(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Run a function that encodes texts in a thread: a long text would block the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *arguments))

    @classmethod
    def load(cls, settings: Settings) -> ServedModel:
        if settings.model is None:
            raise SettingsError("model: a folder is required")
        folder = Path(settings.model)
        config = load_config(folder)
        return cls(
            name=settings.served_model_name or config.name,
            config=config,
            tokenizer=PromptTokenizer.load(folder, config.prompt),
            max_model_len=_max_model_len(config, settings),
            fingerprint=fingerprint(folder),
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
        raise SettingsError(f"max_model_len is {settings.max_model_len}, the model has {limit} positions")
    return settings.max_model_len
