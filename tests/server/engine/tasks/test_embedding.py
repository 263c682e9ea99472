"""Vectors of media: their values, no media item encoded twice, and everything released."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.flamingo import Flamingo
from model.vision import normalise
from server.engine.tasks.embedding import WINDOW
from server.wire import Abort, Embed, MediaFailed, MediaWanted
from tests.engine_client import (
    CONFIG,
    FEW_SHOT,
    MODELS,
    SERVED,
    Client,
    Prompt,
    assert_all_released,
    assert_equals_reference,
    client,
    frames,
    source,
)
from tests.tiny_models import FAMILIES, Family


def embed(request_id: str, images: Sequence[int]) -> Embed:
    return Embed(request_id=request_id, media=[source(image) for image in images])


def vector(model: Flamingo, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    features = model.vision(normalise(torch.from_numpy(image), model.config.vision))  # [F, P, Dv]
    return features.mean((0, 1)).numpy()


def encoded(answer: Client, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record how many media go through the vision encoder: one entry per batch."""
    counts: list[int] = []
    features = answer.engine.runner.model.features

    def watched(pixels: torch.Tensor) -> torch.Tensor:
        counts.append(len(pixels))
        return features(pixels)

    monkeypatch.setattr(answer.engine.runner.model, "features", watched)
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vector_of_a_media_item_is_the_mean_of_its_features(family: Family) -> None:
    answer = client(family)
    answer.images[b"v" * 32] = clip = frames(7, num_frames=3)
    answer.engine.add(Embed(request_id="a", media=[source(0), b"v" * 32, source(1), source(0)]))
    answer.run()
    expected = [vector(MODELS[family], image) for image in (frames(0), clip, frames(1), frames(0))]
    assert answer.embedded["a"] == pytest.approx(np.stack(expected), abs=1e-5)
    assert answer.embedded_counts["a"] == (3, 0)  # one of them in several pieces
    assert sorted(answer.requested) == sorted({source(0), source(1), b"v" * 32})
    assert_all_released(answer.engine)


def test_media_encoded_for_a_prompt_are_not_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client("openflamingo")
    answer.engine.add(FEW_SHOT.request("prompt"))
    answer.run()
    answer.requested.clear()
    counts = encoded(answer, monkeypatch)
    answer.engine.add(embed("a", range(4)))
    answer.run()
    assert (counts, answer.requested, answer.embedded_counts["a"]) == ([], [], (0, 4))
    expected = [vector(MODELS["openflamingo"], frames(i)) for i in range(4)]
    assert answer.embedded["a"] == pytest.approx(np.stack(expected), abs=1e-5)


@pytest.mark.parametrize("host_media_bytes", [0, 1 << 20])
def test_embedded_media_are_not_encoded_again_for_a_prompt(
    host_media_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = client("flamingo", replace(CONFIG, host_media_bytes=host_media_bytes))
    answer.engine.add(embed("a", range(4)))
    answer.run()
    answer.requested.clear()
    counts = encoded(answer, monkeypatch)
    answer.engine.add(FEW_SHOT.request("prompt"))
    answer.run()
    assert (counts, answer.requested) == ([], [])
    assert (answer.admitted["prompt"].media_encoded, answer.admitted["prompt"].media_cached) == (0, 4)
    assert_equals_reference("flamingo", FEW_SHOT, answer, "prompt")
    assert_all_released(answer.engine)


def resampled(answer: Client, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record how many media go through the resampler: one entry per batch."""
    counts: list[int] = []
    resampler = answer.engine.runner.model.resampler
    monkeypatch.setattr(resampler, "forward", _counting(resampler.forward, counts))
    return counts


def _counting(forward: Callable[[torch.Tensor], torch.Tensor], counts: list[int]) -> Callable[..., torch.Tensor]:
    def counted(features: torch.Tensor) -> torch.Tensor:
        counts.append(len(features))
        return forward(features)

    return counted


def test_features_are_answered_before_the_visual_tokens_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client("flamingo")
    counts = resampled(answer, monkeypatch)
    answer.engine.add(embed("a", [0, 1]))
    while "a" not in answer.embedded:
        answer.step()
    assert counts == []
    assert answer.engine.has_work()
    answer.run()
    assert counts == [2]
    assert answer.engine.media.slots.num_free == CONFIG.num_media_slots - 2
    assert_all_released(answer.engine)


def test_a_prompt_that_follows_the_features_reads_the_page_once_it_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer, prompt = client("flamingo"), Prompt(((0, 5),))
    counts = resampled(answer, monkeypatch)
    answer.engine.add(embed("a", [0]))
    while "a" not in answer.embedded:
        answer.step()
    answer.engine.add(prompt.request("prompt"))
    answer.run()
    assert counts == [1]
    assert answer.requested == [source(0)]
    assert (answer.admitted["prompt"].media_encoded, answer.admitted["prompt"].media_cached) == (0, 1)
    assert_equals_reference("flamingo", prompt, answer, "prompt")
    assert_all_released(answer.engine)


def test_embedding_evicts_no_page_if_host_memory_keeps_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client("flamingo", replace(CONFIG, num_media_slots=2))
    for image in (0, 1):
        answer.engine.add(Prompt(((image, 5),)).request(str(image)))
        answer.run()
    answer.engine.add(embed("a", range(2, 6)))
    answer.run()
    assert all(
        answer.engine.media.slots.find(answer.engine.media.content_keys.get(source(i)) or b"") is not None
        for i in (0, 1)
    )
    counts = encoded(answer, monkeypatch)
    answer.engine.add(Prompt(((4, 5),)).request("later"))
    answer.run()
    assert counts == []
    assert_equals_reference("flamingo", Prompt(((4, 5),)), answer, "later")


def test_a_prompt_and_an_embedding_encode_their_common_media_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client("idefics")
    counts = encoded(answer, monkeypatch)
    answer.engine.add(FEW_SHOT.request("prompt"))
    answer.engine.add(embed("a", [3, 2, 1, 0]))
    answer.engine.add(embed("b", [0, 1]))
    answer.run()
    assert sum(counts) == 4
    assert len(answer.requested) == 4
    assert answer.embedded["b"] == pytest.approx(answer.embedded["a"][[3, 2]])
    assert_equals_reference("idefics", FEW_SHOT, answer, "prompt")
    assert_all_released(answer.engine)


def test_an_evicted_vector_is_computed_again_and_the_page_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client("flamingo")
    answer.engine.media.pooled.max_size = 2
    for name, images in (("a", [0, 1]), ("b", [2, 3])):
        answer.engine.add(embed(name, images))
        answer.run()
    answer.requested.clear()
    counts = encoded(answer, monkeypatch)
    answer.engine.add(embed("again", [0]))
    answer.run()
    assert (counts, answer.requested) == ([1], [source(0)])
    assert answer.embedded["again"][0] == pytest.approx(answer.embedded["a"][0], abs=1e-6)
    answer.engine.add(FEW_SHOT.request("prompt"))
    answer.run()
    assert counts == [1]
    assert_all_released(answer.engine)


def test_pixels_are_requested_for_a_few_media_at_a_time() -> None:
    answer = client("flamingo")
    digests = [bytes([i]) * 32 for i in range(3 * WINDOW)]
    answer.images |= {digest: frames(i) for i, digest in enumerate(digests)}
    answer.engine.add(Embed(request_id="a", media=digests))
    max_frames = 0
    while answer.engine.has_work():
        answer.step()
        max_frames = max(max_frames, len(answer.engine.media._encodings))
    assert max_frames <= WINDOW
    assert answer.embedded["a"].shape == (3 * WINDOW, 16)
    assert len(answer.requested) == 3 * WINDOW
    assert_all_released(answer.engine)


def test_requests_for_media_take_turns() -> None:
    answer = client("flamingo")
    digests = [bytes([i]) * 32 for i in range(49)]
    answer.images |= {digest: frames(i) for i, digest in enumerate(digests)}
    answer.engine.add(Embed(request_id="long", media=digests[:48]))
    answer.step()
    answer.engine.add(Embed(request_id="short", media=digests[48:]))
    for _ in range(4):
        answer.step()
    assert list(answer.embedded) == ["short"]
    answer.run()
    assert len(answer.embedded["long"]) == 48
    assert_all_released(answer.engine)


def test_a_step_that_waits_for_pixels_does_nothing() -> None:
    answer = client("flamingo")
    answer.engine.add(embed("a", [0]))
    assert answer.engine.step() == [MediaWanted(source(0))]
    assert answer.engine.is_waiting_for_media()
    assert answer.engine.step() == []
    answer.engine.abort(Abort("a"))
    answer.run()
    assert answer.finished["a"].finish_reason == "abort"
    assert_all_released(answer.engine)


def test_failed_media_fail_only_their_embedding() -> None:
    answer = client("flamingo")
    answer.engine.add(embed("bad", [0, 1]))
    answer.engine.add(embed("good", [1]))
    for event in answer.engine.step():
        if event != MediaWanted(source(0)):
            answer.take(event)
    answer.engine.fail_media(MediaFailed(digest=source(0), message="not an image"))
    answer.run()
    assert answer.finished["bad"].error == "not an image"
    assert answer.embedded["good"].shape == (1, 16)
    assert_all_released(answer.engine)


def test_nonfinite_features_fail_the_embedding_and_are_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client("flamingo")
    with monkeypatch.context() as patched:
        patched.setattr(
            SERVED["flamingo"].flamingo, "features", lambda pixels: torch.full((len(pixels), 1, 4, 16), torch.nan)
        )
        answer.engine.add(embed("a", [0, 1]))
        answer.run()
    assert answer.finished["a"].error == "the model's output is not finite"
    assert_all_released(answer.engine)
    answer.engine.add(embed("again", [0, 1]))
    answer.engine.add(Prompt(((0, 5),)).request("prompt"))
    answer.run()
    assert np.isfinite(answer.embedded["again"]).all()
    assert_equals_reference("flamingo", Prompt(((0, 5),)), answer, "prompt")
    assert_all_released(answer.engine)


def test_nonfinite_visual_tokens_fail_neither_the_embedding_nor_a_later_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, prompt = client("flamingo"), Prompt(((0, 5),))
    with monkeypatch.context() as patched:
        forward = SERVED["flamingo"].flamingo.resampler.forward
        patched.setattr(
            SERVED["flamingo"].flamingo.resampler, "forward", lambda features: forward(features) * torch.nan
        )
        answer.engine.add(embed("a", [0]))
        answer.run()
    assert np.isfinite(answer.embedded["a"]).all()
    assert_all_released(answer.engine)
    answer.engine.add(prompt.request("prompt"))
    answer.run()
    assert_equals_reference("flamingo", prompt, answer, "prompt")
    assert_all_released(answer.engine)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_mix_of_prompts_and_embeddings(data: st.DataObject) -> None:
    config = replace(
        CONFIG,
        num_media_slots=data.draw(st.integers(1, 4)),
        host_media_bytes=data.draw(st.sampled_from([0, 600, 1 << 20])),
        max_frames_idle=data.draw(st.integers(1, 4)),
    )
    answer = client("flamingo", config)
    answer.engine.media.pooled.max_size = data.draw(st.integers(1, 8))
    images = st.lists(st.integers(0, 5), min_size=1, max_size=6)
    requests = data.draw(st.lists(st.tuples(images, st.sampled_from(["prompt", "embed", "abort"])), max_size=6))
    for i, (media, kind) in enumerate(requests):
        prompt = Prompt(tuple((image, 3) for image in media))
        answer.engine.add(prompt.request(str(i)) if kind == "prompt" else embed(str(i), media))
        for _ in range(data.draw(st.integers(0, 3))):
            answer.step()
        if kind == "abort":
            answer.engine.abort(Abort(str(i)))
    answer.run()
    for i, (media, kind) in enumerate(requests):
        if kind == "prompt":
            assert_equals_reference("flamingo", Prompt(tuple((image, 3) for image in media)), answer, str(i))
        elif kind == "embed":
            expected = np.stack([vector(MODELS["flamingo"], frames(image)) for image in media])
            assert answer.embedded[str(i)] == pytest.approx(expected, abs=1e-5)
    assert_all_released(answer.engine)
