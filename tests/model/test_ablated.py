"""The paper's ablations as configuration: other resamplers, and no gates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from model.config import ConfigError, FlamingoConfig
from model.describe import parameters
from model.flamingo import Flamingo
from model.folder import CheckpointError, load_folder, save_folder
from model.presets.paper import PRESETS
from model.presets.scale import tiny
from model.reference import encode, log_probs
from tests.tiny_models import CONFIGS, byte_tokenizer, tiny_model

BASE = CONFIGS["flamingo"]
Kind = Literal["perceiver", "transformer", "mlp"]
KINDS: tuple[Kind, ...] = ("perceiver", "transformer", "mlp")
TOKENS, INDEX = [5, 257, 9, 11, 257, 20, 21], [-1, 0, 0, 0, 1, 1, 1]


def with_resampler(kind: Kind) -> FlamingoConfig:
    return replace(BASE, resampler=replace(BASE.resampler, kind=kind))


def without_gates() -> FlamingoConfig:
    return replace(BASE, gated=replace(BASE.gated, gate="none"))


ABLATED = {"transformer": with_resampler("transformer"), "mlp": with_resampler("mlp"), "no gates": without_gates()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_frames", [1, 3, 8])
def test_any_number_of_frames_becomes_the_same_number_of_visual_tokens(kind: Kind, num_frames: int) -> None:
    model = tiny_model(with_resampler(kind))
    media = torch.randn(2, num_frames, 3, 8, 8)
    tokens = model.encode_media(media)
    assert tokens.shape == (2, 4, 24)
    # the tokens of a media item do not depend on other items
    torch.testing.assert_close(model.encode_media(media[:1]), tokens[:1], atol=1e-5, rtol=1e-5)


def test_only_the_tokens_of_an_mlp_read_a_part_of_the_features() -> None:
    reads = {}
    for kind in KINDS:
        resampler = tiny_model(with_resampler(kind)).resampler
        features = torch.randn(1, 1, 4, 16)
        other = features.clone()
        other[0, 0, 3] += 1.0
        changed = (resampler(features) - resampler(other)).abs().amax(-1)[0] > 1e-6
        reads[kind] = changed.tolist()
    assert reads == {"perceiver": [True] * 4, "transformer": [True] * 4, "mlp": [False, False, False, True]}


@pytest.mark.parametrize("name", ABLATED)
def test_a_folder_loads_and_another_kind_is_refused_by_its_tensors(name: str, tmp_path: Path) -> None:
    config = ABLATED[name]
    model = tiny_model(config)
    tensors = list(model.state_dict().items())
    save_folder(tmp_path / "right", config, tensors, byte_tokenizer().to_str())
    loaded = load_folder(tmp_path / "right", "cpu", torch.float32)
    assert loaded.config == config
    media = [torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)]
    assert torch.equal(
        log_probs(loaded, TOKENS, INDEX, encode(loaded, media)), log_probs(model, TOKENS, INDEX, encode(model, media))
    )
    save_folder(tmp_path / "wrong", BASE, tensors, byte_tokenizer().to_str())
    with pytest.raises(CheckpointError, match=r"resampler\.|attn_gate"):
        load_folder(tmp_path / "wrong", "cpu", torch.float32)


def test_without_gates_branches_are_added_unscaled() -> None:
    model = tiny_model(without_gates())
    assert not [name for name, _ in model.named_parameters() if name.endswith("_gate")]
    gated = tiny_model(BASE)
    for name, parameter in gated.named_parameters():
        if name.endswith("_gate"):
            parameter.fill_(20.0)  # tanh is one
    gated.load_state_dict(model.state_dict(), strict=False)
    media = encode(model, [torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)])
    expected = log_probs(gated, TOKENS, INDEX, media)
    torch.testing.assert_close(log_probs(model, TOKENS, INDEX, media), expected, atol=1e-5, rtol=1e-5)
    model.fold_gates()
    torch.testing.assert_close(log_probs(model, TOKENS, INDEX, media), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_settings_of_the_perceiver_alone_are_refused(kind: Kind) -> None:
    with pytest.raises(ConfigError, match=f"resampler.qk_norm requires resampler.kind 'perceiver', but it is '{kind}'"):
        replace(BASE, resampler=replace(BASE.resampler, kind=kind, qk_norm=True))


def test_names_of_tensors_are_those_of_existing_folders() -> None:
    """Every folder on disk has these names of the resampler's tensors."""
    names = {name.split(".")[0] for name in Flamingo(BASE).resampler.state_dict()}
    assert names == {"input", "spatial_embeddings", "frame_embeddings", "latents", "layers", "norm"}


@pytest.mark.parametrize("preset", [PRESETS["flamingo-3b"], tiny(PRESETS["flamingo-3b"]), BASE], ids=lambda p: p.name)
def test_every_resampler_has_the_perceivers_number_of_parameters(preset: FlamingoConfig) -> None:
    counted = {}
    for kind in KINDS:
        counted[kind] = parameters(replace(preset, resampler=replace(preset.resampler, kind=kind)))["resampler"]
    assert counted["mlp"] == counted["perceiver"]
    # its layers have one norm of two vectors less
    norms = preset.resampler.num_layers * 2 * preset.resampler.dim
    assert counted["transformer"] == counted["perceiver"] - norms
