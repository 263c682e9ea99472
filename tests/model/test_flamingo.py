"""The invariants of the model: closed gates change nothing, a token reads only its media, folding keeps the function."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from kernels import media_attention
from model.batch import NO_CACHE, Batch, MediaPages, whole_sequences
from model.flamingo import Flamingo
from model.reference import encode, generate, log_probs
from model.vision import interpolate_frames
from tests.tiny_models import CONFIGS, FAMILIES, Family, tiny_model

TOKENS = [5, 257, 9, 11, 257, 20, 21]
INDEX = [-1, 0, 0, 0, 1, 1, 1]


def pixels(*seeds: int, frames: int = 1) -> list[Tensor]:
    return [torch.randn(frames, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def bare(model: Flamingo, batch: Batch) -> Tensor:
    """Return the logits of the language model alone."""
    lm = model.language_model
    x = lm.embed_tokens(batch)
    context = lm.step_context(batch, x.dtype)
    for layer in lm.layers:
        x = layer(x, context, None)
    return lm.logits(x)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_closed_gates_leave_the_language_model_bit_for_bit(family: Family, fold: bool) -> None:
    model = tiny_model(CONFIGS[family])
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.zero_()
    if fold:
        model.fold_gates()
    batch = whole_sequences([TOKENS], [INDEX])
    assert torch.equal(model(batch, NO_CACHE, encode(model, pixels(1, 2))), bare(model, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_change_the_language_model(family: Family) -> None:
    model = tiny_model(CONFIGS[family])
    batch = whole_sequences([TOKENS], [INDEX])
    assert not torch.allclose(model(batch, NO_CACHE, encode(model, pixels(1, 2))), bare(model, batch), atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_gates_keep_the_function(family: Family) -> None:
    model = tiny_model(CONFIGS[family])
    media = encode(model, pixels(1, 2))
    before = log_probs(model, TOKENS, INDEX, media)
    model.fold_gates()
    torch.testing.assert_close(log_probs(model, TOKENS, INDEX, media), before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_media_affect_the_text_from_their_own_on(family: Family) -> None:
    model = tiny_model(CONFIGS[family])
    base = log_probs(model, TOKENS, INDEX, encode(model, pixels(1, 2)))
    other_second = log_probs(model, TOKENS, INDEX, encode(model, pixels(1, 3)))
    other_first = log_probs(model, TOKENS, INDEX, encode(model, pixels(3, 2)))
    assert torch.equal(base[:4], other_second[:4])
    assert not torch.allclose(base[4:], other_second[4:], atol=1e-3)
    assert torch.equal(base[:1], other_first[:1])
    assert not torch.allclose(base[1:4], other_first[1:4], atol=1e-3)


def gated_output(attends: Literal["last", "all_previous"], *seeds: int) -> Tensor:
    """Return the output of the first gated layer on fixed text, where only its attention carries media to tokens."""
    config = CONFIGS["flamingo"]
    model = tiny_model(replace(config, gated=replace(config.gated, attends=attends)))
    media = encode(model, pixels(*seeds))
    x = torch.randn(len(TOKENS), config.language_model.dim, generator=torch.Generator().manual_seed(0))
    slots = torch.tensor(model.media_slots(INDEX), dtype=torch.int32)
    output: Tensor = model.gated["0"](x, media.layer(0), slots)
    return output


def test_text_reads_only_its_last_media() -> None:
    base, other_first = gated_output("last", 1, 2), gated_output("last", 3, 2)
    assert torch.equal(base[4:], other_first[4:])
    assert torch.equal(base[:1], other_first[:1])
    assert not torch.allclose(base[1:4], other_first[1:4], atol=1e-3)


def test_the_ablation_reads_all_previous_media() -> None:
    base, other_first, other_second = (gated_output("all_previous", *seeds) for seeds in ((1, 2), (3, 2), (1, 3)))
    assert not torch.allclose(base[4:], other_first[4:], atol=1e-3)
    assert not torch.allclose(base[4:], other_second[4:], atol=1e-3)
    assert torch.equal(base[:4], other_second[:4])


@pytest.mark.parametrize("attends", ["last", "all_previous"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_needs_media_skips_tokens_without_media(
    family: Family, attends: Literal["last", "all_previous"]
) -> None:
    config = CONFIGS[family]
    model = tiny_model(replace(config, gated=replace(config.gated, needs_media=True, attends=attends)))
    as_paper = tiny_model(replace(config, gated=replace(config.gated, attends=attends)))
    as_paper.load_state_dict(model.state_dict())
    media = encode(model, pixels(1, 2))
    text, mixed = (
        replace(
            whole_sequences([TOKENS], [INDEX]), media_slot=torch.tensor(model.media_slots(index), dtype=torch.int32)
        )
        for index in ([-1] * len(TOKENS), INDEX)
    )
    alone = bare(model, text)
    assert torch.equal(model(text, NO_CACHE, media), alone)
    assert torch.equal(model(replace(text, media_slot=None), NO_CACHE, media), alone)
    assert not torch.equal(as_paper(text, NO_CACHE, media), alone)
    torch.testing.assert_close(model(mixed, NO_CACHE, media)[:1], alone[:1])
    layer = config.gated_layers[0]
    seen = (torch.randn(len(TOKENS), config.language_model.dim), media.layer(layer), mixed.media_slot)
    assert torch.equal(model.gated[str(layer)](*seen)[1:], as_paper.gated[str(layer)](*seen)[1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_plans_its_media_once(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(CONFIGS[family])
    runs_of = Mock(wraps=media_attention._runs)
    monkeypatch.setattr(media_attention, "_runs", runs_of)
    model(whole_sequences([TOKENS], [INDEX]), NO_CACHE, encode(model, pixels(1, 2)))
    runs_of.assert_called_once_with(INDEX)


def test_packing_sequences_does_not_mix_them() -> None:
    model = tiny_model(CONFIGS["idefics"])
    media = encode(model, pixels(1, 2))
    first, second = TOKENS, [7, 257, 8]
    packed = model(whole_sequences([first, second], [INDEX, [-1, 1, 1]]), NO_CACHE, media)
    alone = model(whole_sequences([second], [[-1, 1, 1]]), NO_CACHE, media)
    torch.testing.assert_close(packed[len(first) :], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_frames_becomes_the_same_number_of_visual_tokens(family: Family) -> None:
    model = tiny_model(CONFIGS[family])
    resampler = model.config.resampler
    for frames in (1, 3, 8):
        tokens = model.encode_media(torch.stack(pixels(1, 2, frames=frames)))
        assert tokens.shape == (2, resampler.num_latents, resampler.dim)


def test_frames_have_an_embedding_of_their_time() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    (clip,) = pixels(1, frames=3)
    forward, backward = model.encode_media(clip[None]), model.encode_media(clip.flip(0)[None])
    assert not torch.allclose(forward, backward, atol=1e-3)


def test_more_frames_than_trained_are_interpolated_linearly() -> None:
    trained = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, -1.0]])
    assert torch.equal(interpolate_frames(trained, 2), trained[:2])
    expected = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [3.0, 0.0], [4.0, -1.0]])
    torch.testing.assert_close(interpolate_frames(trained, 5), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_agrees_with_log_probs(family: Family) -> None:
    model = tiny_model(CONFIGS[family])
    answer = generate(model, TOKENS, INDEX, pixels(1, 2), max_tokens=6, suppressed_ids=[257])
    assert len(answer.token_ids) == 6
    whole = log_probs(model, TOKENS + answer.token_ids, INDEX + [1] * 6, encode(model, pixels(1, 2)))
    for index, (token_id, logprob) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True), len(TOKENS) - 1):
        assert logprob == pytest.approx(float(whole[index, token_id]), abs=1e-5)
        row = whole[index].clone()
        row[257] = -torch.inf
        assert int(row.argmax()) == token_id


def test_generation_stops_at_the_end_of_sequence() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    answer = generate(model, TOKENS, INDEX, pixels(1, 2), max_tokens=6)
    stopped = generate(model, TOKENS, INDEX, pixels(1, 2), max_tokens=6, eos_ids=[answer.token_ids[2]])
    assert stopped.token_ids == answer.token_ids[: answer.token_ids.index(answer.token_ids[2]) + 1]


def test_a_prompt_without_media_runs() -> None:
    model = tiny_model(CONFIGS["openflamingo"])
    empty = encode(model, [])
    assert isinstance(empty, MediaPages)
    assert log_probs(model, [1, 2, 3], [-1, -1, -1], empty).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_that_reads_no_media_is_the_same_without_slots(family: Family) -> None:
    model = tiny_model(CONFIGS[family])
    batch = whole_sequences([[1, 2, 3]], [[-1, -1, -1]])
    empty = encode(model, [])
    assert torch.equal(model(batch, NO_CACHE, empty), model(replace(batch, media_slot=None), NO_CACHE, empty))
