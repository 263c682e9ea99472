"""Vectors of texts: their values, turns with other work, and refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.batch import whole_sequences
from model.flamingo import Flamingo
from model.layered import LayeredForward
from server.wire import Abort, Embed, EmbedText, Outbound
from tests.engine_client import (
    CONFIG,
    FEW_SHOT,
    MODELS,
    Client,
    assert_all_released,
    assert_equals_reference,
    client,
    client_with_long_steps,
)
from tests.tiny_models import FAMILIES, Family

TEXTS = [[1, 2, 3], [4], list(range(40)), [5, 6], [1, 2, 3]]


def text_vector(model: Flamingo, ids: list[int]) -> NDArray[np.float32]:
    """Return the mean output of the last norm before the head, in a forward without gated layers, of length one."""
    hidden: list[torch.Tensor] = []
    handle = model.language_model.norm.register_forward_hook(lambda module, inputs, out: hidden.append(out))
    try:
        batch = whole_sequences([ids], [[-1] * len(ids)])
        x = model.language_model.embed_tokens(batch)
        context = model.language_model.step_context(batch, x.dtype)
        for layer in model.language_model.layers:
            x = layer(x, context, None)
        model.language_model.logits(x)
    finally:
        handle.remove()
    mean: NDArray[np.float32] = hidden[0].mean(0).numpy()
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_tokens_per_step", [4, 512])
def test_the_vector_of_a_text_is_the_mean_of_its_last_hidden_states(family: Family, max_tokens_per_step: int) -> None:
    answer = client(family, replace(CONFIG, max_tokens_per_step=max_tokens_per_step))
    answer.engine.add(EmbedText(request_id="a", texts=TEXTS))
    answer.run()
    expected = np.stack([text_vector(MODELS[family], ids) for ids in TEXTS])
    assert answer.embedded["a"] == pytest.approx(expected, abs=1e-5)
    assert_all_released(answer.engine)


def test_embedding_texts_does_not_change_answers() -> None:
    answer = client("idefics", replace(CONFIG, max_tokens_per_step=8))
    answer.engine.add(FEW_SHOT.request("prompt"))
    answer.engine.add(EmbedText(request_id="a", texts=TEXTS))
    answer.engine.add(EmbedText(request_id="gone", texts=TEXTS))
    answer.step()
    answer.engine.abort(Abort("gone"))
    answer.run()
    assert answer.embedded["a"].shape == (5, 32)
    assert "gone" not in answer.embedded
    assert_equals_reference("idefics", FEW_SHOT, answer, "prompt")
    assert_all_released(answer.engine)


def watch_rounds(answer: Client, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Note each piece of a forward without a cache: which engine step it follows, and its tokens."""
    pieces: list[tuple[int, int]] = []
    steps, step, run = [0], answer.engine.step, LayeredForward.run

    def counted() -> list[Outbound]:
        steps[0] += 1
        return step()

    def watched(forward: LayeredForward, layer: torch.nn.Module) -> Iterator[int]:
        for num_tokens in run(forward, layer):
            pieces.append((steps[0], num_tokens))
            yield num_tokens

    monkeypatch.setattr(answer.engine, "step", counted)
    monkeypatch.setattr(LayeredForward, "run", watched)
    return pieces


def test_a_round_has_few_tokens_for_any_number_of_requests_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client("flamingo", replace(CONFIG, max_tokens_per_step=64))
    pieces = watch_rounds(answer, monkeypatch)
    long = [list(range(100)), list(range(90)), [1, 2, 3]]
    for name in "abc":
        answer.engine.add(EmbedText(request_id=name, texts=long))
    answer.run(2000)
    num_layers = len(MODELS["flamingo"].language_model.layers)
    tokens: Counter[int] = Counter()
    for step, num_tokens in pieces:
        tokens[step] += num_tokens
    # a sixteenth of a step: 4 tokens through each layer, and less than one piece more
    assert max(tokens.values()) < (4 + 4) * num_layers
    assert sum(tokens.values()) == 3 * 193 * num_layers
    assert all((answer.embedded[name] == answer.embedded["a"]).all() for name in "bc")
    expected = np.stack([text_vector(MODELS["flamingo"], ids) for ids in long])
    assert answer.embedded["a"] == pytest.approx(expected, abs=1e-5)
    assert_all_released(answer.engine)


def test_texts_take_turns_with_each_other_and_with_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client_with_long_steps(monkeypatch, replace(CONFIG, max_tokens_per_step=64))
    answer.engine.add(EmbedText(request_id="long", texts=[list(range(100))] * 20))
    for _ in range(5):
        answer.step()
    answer.engine.add(EmbedText(request_id="short", texts=[[1, 2, 3]]))
    answer.engine.add(FEW_SHOT.request("prompt"))
    alone = client_with_long_steps(monkeypatch, replace(CONFIG, max_tokens_per_step=64))
    alone.engine.add(FEW_SHOT.request("prompt"))
    num_steps = 0
    while alone.engine.has_work():
        alone.step()
        num_steps += 1
    for _ in range(num_steps):
        answer.step()
    assert_equals_reference("flamingo", FEW_SHOT, answer, "prompt")
    assert "short" in answer.embedded
    assert "long" not in answer.embedded
    answer.run(2000)
    assert answer.embedded["long"].shape == (20, 32)
    assert_all_released(answer.engine)


def test_running_out_of_memory_fails_only_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*arguments: object) -> None:
        raise torch.OutOfMemoryError

    answer = client("flamingo")
    answer.engine.add(FEW_SHOT.request("prompt"))
    answer.engine.add(EmbedText(request_id="a", texts=TEXTS))
    monkeypatch.setattr("server.engine.tasks.embedding.LayeredForward", exhausted)
    answer.run()
    assert "not enough memory" in answer.finished["a"].error
    assert_equals_reference("flamingo", FEW_SHOT, answer, "prompt")
    assert_all_released(answer.engine)


@pytest.mark.parametrize(("texts", "message"), [([[1], []], "at least one token"), ([[1] * 129], "129 tokens exceeds")])
def test_texts_that_cannot_be_embedded_are_refused(texts: list[list[int]], message: str) -> None:
    answer = client("flamingo")
    answer.engine.add(EmbedText(request_id="a", texts=texts))
    answer.run()
    assert message in answer.finished["a"].error


def test_an_empty_request_gives_no_vectors() -> None:
    answer = client("flamingo")
    answer.engine.add(EmbedText(request_id="texts", texts=[]))
    answer.engine.add(Embed(request_id="media", media=[]))
    answer.run()
    assert answer.embedded["texts"].size == answer.embedded["media"].size == 0
