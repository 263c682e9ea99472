"""Experts with random weights, in the form that `model.checkpoint.experts` returns, and a byte tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from model.checkpoint.experts import LANGUAGE_MODEL, VISION, LanguageExpert, VisionExpert
from model.config import ConfigError, FlamingoConfig
from model.language_model import LanguageModel
from model.presets.paper import END_OF_TEXT
from model.vision import VisionEncoder

SEED = 0
NUM_BYTES = 256


def random_language_expert(preset: FlamingoConfig, dtype: torch.dtype) -> LanguageExpert:
    """Return the preset's language model, with a token per byte; the rest of its vocabulary is unused."""
    config, prompt = preset.language_model, preset.prompt
    tensors = _random_tensors(lambda: LanguageModel(config), LANGUAGE_MODEL, dtype)
    return LanguageExpert(
        config=config,
        tensors={name: tensor for name, tensor in tensors.items() if not name.endswith(".new_rows")},
        tokenizer=byte_tokenizer(config.vocab_size, (prompt.media_token, prompt.end_of_chunk)),
        prompt=prompt,
    )


def random_vision_expert(preset: FlamingoConfig, dtype: torch.dtype) -> VisionExpert:
    config = preset.vision
    return VisionExpert(config=config, tensors=_random_tensors(lambda: VisionEncoder(config), VISION, dtype))


def _random_tensors(build: Callable[[], nn.Module], prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a new module; they are the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = build().to(dtype)
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}


def byte_tokenizer(vocab_size: int, new_tokens: tuple[str, ...]) -> Tokenizer:
    """Return a tokenizer with an id per byte, the end of text, unused ids up to `vocab_size`, and the new tokens."""
    if vocab_size <= NUM_BYTES:
        raise ConfigError(f"vocab_size is {vocab_size}, must exceed the {NUM_BYTES} bytes")
    frozen = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END_OF_TEXT]
    frozen += [f"<unused{number}>" for number in range(vocab_size - len(frozen))]
    tokenizer = Tokenizer(models.BPE({token: token_id for token_id, token in enumerate(frozen)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (END_OF_TEXT, *new_tokens)]
    tokenizer.add_special_tokens(special)
    return tokenizer
