"""Tests of the first layers' states: one per page, and equal to those of the whole forward."""

from __future__ import annotations

import torch

from model.batch import NO_CACHE, whole_sequences
from tests.tiny_models import CONFIGS, tiny_model
from training.default.states import early_states, media_states

PROMPT = (5, 256, 9)


def test_each_pages_state_is_independent_of_the_other_pages() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    config = model.config.resampler
    tokens = torch.randn(3, config.num_latents, config.dim, generator=torch.Generator().manual_seed(0))
    states = media_states(model, model.fresh_media(tokens), PROMPT)
    assert states.shape == (3, model.config.language_model.dim)
    for page in range(3):
        alone = media_states(model, model.fresh_media(tokens[page : page + 1]), PROMPT)
        torch.testing.assert_close(states[page : page + 1], alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(states[0], states[1], atol=1e-3)


def test_early_states_equal_those_of_the_whole_forward() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    config = model.config.resampler
    media = model.fresh_media(torch.randn(1, config.num_latents, config.dim))
    batch = whole_sequences([list(PROMPT)], [[-1, 0, 0]])
    whole = model.language_model.logits(early_states(model, batch, media))  # the tiny decoder has no layers beyond
    torch.testing.assert_close(whole, model(batch, NO_CACHE, media))
