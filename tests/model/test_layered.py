"""A forward in pieces equals the forward in one, for any size of piece."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.batch import whole_sequences
from model.language_model import LanguageModel
from model.layered import LayeredForward
from tests.tiny_models import CONFIGS, FAMILIES, Family, tiny_model


def whole(model: LanguageModel, texts: list[list[int]]) -> Tensor:
    """Return the input of the head from one call of each layer."""
    batch = whole_sequences(texts, [[-1] * len(ids) for ids in texts])
    x = model.embed_tokens(batch)
    context = model.step_context(batch, x.dtype)
    for layer in model.layers:
        x = layer(x, context, None)
    return model.norm(x)


def in_pieces(model: LanguageModel, texts: list[list[int]], max_tokens: int) -> tuple[Tensor, list[int]]:
    forward = LayeredForward(model, texts, max_tokens)
    pieces = [num_tokens for layer in model.layers for num_tokens in forward.run(layer)]
    return forward.hidden_states(), pieces


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_texts_that_fit_are_computed_bit_for_bit_as_in_one_call(family: Family) -> None:
    model = tiny_model(CONFIGS[family]).language_model
    texts = [[1, 2, 3], [4], list(range(40))]
    hidden, pieces = in_pieces(model, texts, 44)
    assert torch.equal(hidden, whole(model, texts))
    assert pieces == [44] * len(model.layers)


@pytest.mark.parametrize("max_tokens", [1, 6, 16, 50, 99])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_longer_text_passes_each_layer_in_spans(family: Family, max_tokens: int) -> None:
    model = tiny_model(CONFIGS[family]).language_model
    text = [(7 * i) % 256 for i in range(100)]
    hidden, pieces = in_pieces(model, [text], max_tokens)
    assert float((hidden - whole(model, [text])).abs().max()) < 2e-5
    assert sum(pieces) == 100 * len(model.layers)
    assert max(pieces) <= max_tokens
    assert max(pieces) - min(pieces) <= 1
