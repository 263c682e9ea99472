"""Inspections: the numbers of the model's own forward, no effect on other requests, and everything released."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.inspect import patch_grid, patch_shares
from model.reference import encode
from model.vision import normalise
from server.wire import Abort, AttentionMap, Inspect, MediaFailed, MediaWanted
from tests.engine_client import (
    CONFIG,
    FEW_SHOT,
    MODELS,
    Prompt,
    assert_all_released,
    assert_equals_reference,
    client,
    frames,
    source,
)
from tests.model.test_inspect import media_weights
from tests.tiny_models import FAMILIES, Family


def inspect(request_id: str, prompt: Prompt, token: int, layers: list[int] | None = None) -> Inspect:
    request = prompt.request(request_id)
    return Inspect(
        request_id=request_id,
        prompt=request.prompt,
        token=token,
        layers=layers or [],
    )


def grid(attention: AttentionMap) -> NDArray[np.float32]:
    return np.frombuffer(attention.data, np.float32).reshape(attention.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_are_those_of_the_models_forward(family: Family) -> None:
    answer, model = client(family), MODELS[family]
    config, request = model.config, FEW_SHOT.request("x")
    token = len(request.prompt.token_ids) - 4  # it reads the third media
    answer.engine.add(inspect("mean", FEW_SHOT, token))
    answer.engine.add(inspect("last", FEW_SHOT, token, [config.gated_layers[-1]]))
    answer.run()
    media = encode(model, FEW_SHOT.pixels(model))
    seen = media_weights(model, request.prompt.token_ids, request.prompt.media_index, media, token, config.gated_layers)
    pixels = normalise(torch.from_numpy(frames(2)), config.vision)
    patches = patch_shares(model.resampler, model.features(pixels[None])[0])
    (mean,), (last,) = answer.inspected["mean"].maps, answer.inspected["last"].maps
    assert (mean.layers, last.layers) == (list(config.gated_layers), [config.gated_layers[-1]])
    weights = torch.stack(list(seen.values())).mean(0)
    assert mean.visual_tokens == pytest.approx(weights.tolist(), abs=1e-5)
    assert last.visual_tokens == pytest.approx(seen[config.gated_layers[-1]].tolist(), abs=1e-5)
    assert grid(mean) == pytest.approx(patch_grid(weights, patches, config.vision).numpy(), abs=1e-5)
    assert grid(mean).shape == (1, 2, 2)
    assert float(grid(last).sum()) == pytest.approx(1, abs=1e-5)
    assert [gate.layer for gate in answer.inspected["mean"].gates] == list(config.gated_layers)
    assert all(0 < gate.attention < 1 for gate in answer.inspected["mean"].gates)
    assert_all_released(answer.engine)


def test_a_video_has_one_grid_per_frame() -> None:
    answer = client("idefics")
    answer.images[source(0)] = frames(0, num_frames=5)
    answer.engine.add(inspect("a", Prompt(((0, 5),)), 3))
    answer.run()
    assert grid(answer.inspected["a"].maps[0]).shape == (5, 2, 2)


def test_a_token_before_all_media_has_gates_and_no_map() -> None:
    answer = client("openflamingo")
    answer.engine.add(inspect("a", FEW_SHOT, 1))
    answer.run()
    assert answer.requested == []
    assert answer.inspected["a"].maps == []
    assert len(answer.inspected["a"].gates) == 2


def test_media_after_the_token_are_not_requested() -> None:
    answer = client("flamingo")
    answer.engine.add(inspect("a", FEW_SHOT, 5))
    answer.run()
    assert answer.requested == [source(0)]


def test_inspecting_does_not_change_answers_and_requests_cached_media_again() -> None:
    answer = client("flamingo", replace(CONFIG, max_tokens_per_step=8))
    answer.engine.add(FEW_SHOT.request("before"))
    answer.run()
    answer.engine.add(FEW_SHOT.request("prompt"))
    answer.engine.add(inspect("a", FEW_SHOT, 12))
    answer.engine.add(inspect("gone", FEW_SHOT, 12))
    answer.engine.abort(Abort("gone"))
    answer.run()
    assert sorted(answer.requested) == sorted([source(i) for i in range(4)] + [source(i) for i in range(2)])
    assert "gone" not in answer.inspected
    assert len(answer.inspected["a"].maps) == 1
    assert_equals_reference("flamingo", FEW_SHOT, answer, "prompt")
    assert_all_released(answer.engine)


def test_a_round_encodes_few_frames_and_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client("flamingo", replace(CONFIG, max_tokens_per_step=32))
    for image in range(4):
        answer.images[source(image)] = frames(image, num_frames=5)
    frames_by_step: Counter[int] = Counter()
    tokens_by_step: Counter[int] = Counter()
    model, step = answer.engine.runner.model, 0
    features, embed = model.features, model.language_model.layers[0].forward

    def watched(pixels: torch.Tensor) -> torch.Tensor:
        frames_by_step[step] += pixels.shape[0] * pixels.shape[1]
        return features(pixels)

    def counted(x: torch.Tensor, *arguments: object) -> torch.Tensor:
        tokens_by_step[step] += len(x)
        return embed(x, *arguments)

    monkeypatch.setattr(model, "features", watched)
    monkeypatch.setattr(model.language_model.layers[0], "forward", counted)
    answer.engine.add(inspect("a", FEW_SHOT, 26))
    while answer.engine.has_work():
        step += 1
        answer.step()
    assert sorted(frames_by_step.values(), reverse=True) == [2] * 8 + [1] * 4
    # a sixteenth of a step: 2 tokens through each layer, or more through one layer, and less than one piece more
    assert max(tokens_by_step.values()) < (2 + 2) * len(model.language_model.layers)
    assert sum(tokens_by_step.values()) == 27
    assert grid(answer.inspected["a"].maps[0]).shape == (5, 2, 2)
    assert_all_released(answer.engine)


def test_failed_media_fail_the_inspection() -> None:
    answer = client("flamingo")
    answer.engine.add(inspect("a", FEW_SHOT, 5))
    assert answer.engine.step() == [MediaWanted(source(0))]
    assert answer.engine.is_waiting_for_media()
    answer.engine.fail_media(MediaFailed(digest=source(0), message="not an image"))
    answer.run()
    assert answer.finished["a"].error == "not an image"
    assert_all_released(answer.engine)


def test_media_that_fail_once_their_frames_have_arrived_do_not_fail_the_inspection() -> None:
    answer = client("flamingo")
    answer.engine.add(inspect("a", FEW_SHOT, 12))
    assert answer.engine.step() == [MediaWanted(source(0)), MediaWanted(source(1))]
    answer.take(MediaWanted(source(0)))
    answer.engine.fail_media(MediaFailed(digest=source(0), message="deleted meanwhile"))
    answer.take(MediaWanted(source(1)))
    answer.run()
    assert len(answer.inspected["a"].maps) == 1
    assert_all_released(answer.engine)


def test_running_out_of_memory_fails_only_the_inspection(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*arguments: object) -> None:
        raise torch.OutOfMemoryError

    answer = client("flamingo")
    answer.engine.add(FEW_SHOT.request("prompt"))
    answer.engine.add(inspect("a", FEW_SHOT, 5))
    monkeypatch.setattr("server.engine.tasks.inspection.inspect.media_weights", exhausted)
    answer.run()
    assert "not enough memory" in answer.finished["a"].error
    assert_equals_reference("flamingo", FEW_SHOT, answer, "prompt")
    assert_all_released(answer.engine)


@pytest.mark.parametrize(
    ("token", "layers", "message"),
    [
        (27, [], "token is 27, must be at least 0 and below the prompt's 27 tokens"),
        (-1, [], "token is -1"),
        (3, [0, 9], r"layers [0, 9] are not gated layers"),
    ],
)
def test_an_invalid_token_or_layer_is_refused(token: int, layers: list[int], message: str) -> None:
    answer = client("openflamingo")
    answer.engine.add(inspect("a", FEW_SHOT, token, layers))
    answer.run()
    assert message in answer.finished["a"].error
