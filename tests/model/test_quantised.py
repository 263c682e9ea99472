"""Packed weights: which matrices are packed, one at a time; the model computes what its unpacked weights do."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kernels.fp8 import quantise_rows_reference
from kernels.weight_only import unpack_int4_reference, unpack_int8_reference
from model.config import FlamingoConfig
from model.flamingo import Flamingo
from model.folder import SafetensorsFiles, load_folder, save_folder
from model.footprint import Footprint
from model.inference import prepare_for_inference
from model.quantised import KINDS, Fp8Linear, Int4Linear, Int8Linear, QuantisedLinear, WeightFormat
from model.ranks import Part
from model.reference import encode, log_probs
from tests.tiny_models import CONFIGS, FAMILIES, Family, byte_tokenizer, tiny_model, widened

TOKENS, INDEX = [5, 257, 9, 11, 257, 20, 21], [-1, 0, 0, 0, 1, 1, 1]
PIXELS = list(torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def saved(config: FlamingoConfig, folder: Path) -> Path:
    save_folder(folder, config, tiny_model(config).state_dict().items(), byte_tokenizer().to_str())
    return folder


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family: Family = request.param
    return saved(widened(CONFIGS[family]), tmp_path / family)


def packed_layers(model: Flamingo) -> dict[str, QuantisedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}


def unpacked(layer: nn.Module) -> Tensor:
    """Return the matrix [N, K] that a layer multiplies by."""
    match layer:
        case Fp8Linear():
            return layer.packed.float() * layer.scale[:, None]
        case Int8Linear():
            return unpack_int8_reference(layer.packed, layer.scale, torch.float32)
        case Int4Linear():
            return unpack_int4_reference(layer.packed, layer.constants, torch.float32)
    raise TypeError(layer)


class RoundedLinear(nn.Linear):
    """A linear layer whose activations are rounded to fp8."""

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = quantise_rows_reference(x)
        return super().forward(rows.float() * scale)


def unpack(model: Flamingo) -> Flamingo:
    """Replace the packed layers by linear ones of the same weights."""
    for path, layer in packed_layers(model).items():
        weight = unpacked(layer)
        kind = RoundedLinear if isinstance(layer, Fp8Linear) else nn.Linear
        linear = kind(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            linear.bias = layer.bias
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, linear)
    return model


@pytest.mark.parametrize("weight_format", KINDS)
def test_the_matrices_of_decoder_and_gated_layers_are_packed(weight_format: WeightFormat, folder: Path) -> None:
    model = load_folder(folder, "cpu", torch.bfloat16, weight_format=weight_format)
    linears = {name for name, module in tiny_model(model.config).named_modules() if isinstance(module, nn.Linear)}
    expected = {name for name in linears if name.startswith(("language_model.", "gated."))}
    assert packed_layers(model).keys() == {name for name in expected if not name.endswith("key_value")}
    assert all(isinstance(layer, KINDS[weight_format]) for layer in packed_layers(model).values())
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("weight_format", KINDS)
def test_weights_are_packed_from_the_numbers_of_the_file(weight_format: WeightFormat, folder: Path) -> None:
    model = load_folder(folder, "cpu", torch.bfloat16, weight_format=weight_format)
    stored = tiny_model(model.config).state_dict()
    steps = {"fp8": 2**-4, "int8": 1 / 127 / 2, "int4": 1 / 15}  # of the largest number of a row, at most
    for name, layer in packed_layers(model).items():
        weight = stored[f"{name}.weight"]
        largest = weight.abs().amax(1, keepdim=True)
        assert float(((unpacked(layer) - weight) / largest).abs().max()) < 1.05 * steps[weight_format]


@pytest.mark.parametrize("weight_format", KINDS)
def test_the_model_computes_what_its_unpacked_weights_do(weight_format: WeightFormat, folder: Path) -> None:
    packed, plain = (load_folder(folder, "cpu", torch.float32, weight_format=weight_format) for _ in range(2))
    unpack(plain)
    actual, expected = (log_probs(model, TOKENS, INDEX, encode(model, PIXELS)) for model in (packed, plain))
    # an activation between two numbers of fp8 may become the other one
    torch.testing.assert_close(actual, expected, atol=5e-2 if weight_format == "fp8" else 1e-4, rtol=0)


@pytest.mark.parametrize("weight_format", KINDS)
def test_gates_are_folded_into_the_scales(weight_format: WeightFormat, folder: Path) -> None:
    untouched, folded = (load_folder(folder, "cpu", torch.float32, weight_format=weight_format) for _ in range(2))
    prepare_for_inference(folded)
    actual, expected = (log_probs(model, TOKENS, INDEX, encode(model, PIXELS)) for model in (folded, untouched))
    # the constants of int4 are rounded to bfloat16 once more
    torch.testing.assert_close(actual, expected, atol=5e-2 if weight_format == "int4" else 1e-3, rtol=0)
    for gated, before in zip(folded.gated_layers().values(), untouched.gated_layers().values(), strict=True):
        assert gated.attn_gate is None
        assert before.attn_gate is not None
        product = unpacked(before.attention.output) * before.attn_gate.tanh()[:, None]
        torch.testing.assert_close(unpacked(gated.attention.output), product, atol=0.02, rtol=0)


@pytest.mark.parametrize("weight_format", KINDS)
def test_media_pages_are_the_same_in_all_formats(weight_format: WeightFormat, folder: Path) -> None:
    plain = load_folder(folder, "cpu", torch.bfloat16)
    packed = load_folder(folder, "cpu", torch.bfloat16, weight_format=weight_format)
    tokens = plain.encode_media(torch.stack(PIXELS))
    assert torch.equal(packed.encode_media(torch.stack(PIXELS)), tokens)
    pages = [prepare_for_inference(model).project_media(tokens) for model in (plain, packed)]
    assert torch.equal(*pages)


@pytest.mark.parametrize("weight_format", KINDS)
def test_what_is_counted_is_what_is_held(weight_format: WeightFormat, folder: Path) -> None:
    model = load_folder(folder, "cpu", torch.bfloat16, weight_format=weight_format)
    footprint = Footprint.of(model.config, torch.bfloat16, weight_format=weight_format)
    packed = packed_layers(model)
    held = {
        part: sum(weight.nbytes for weight in module.parameters())
        + sum(b.nbytes for name, layer in packed.items() if name.startswith(f"{part}.") for b in layer.buffers())
        for part, module in model.named_children()
    }
    assert footprint.weights == held
    assert footprint.token == Footprint.of(model.config, torch.bfloat16).token


def test_a_matrix_that_a_kernel_does_not_take_stays(tmp_path: Path) -> None:
    config = widened(CONFIGS["idefics"])
    config = replace(config, gated=replace(config.gated, ffn_dim=80))
    packed = {}
    for weight_format in KINDS:
        model = load_folder(saved(config, tmp_path / weight_format), "cpu", torch.bfloat16, weight_format=weight_format)
        packed[weight_format] = packed_layers(model)
        log_probs(model, TOKENS, INDEX, encode(model, PIXELS))
    assert "gated.0.feed_forward.down" in packed["fp8"]
    for weight_format in ("int8", "int4"):
        assert "gated.0.feed_forward.up" in packed[weight_format]
        assert "gated.0.feed_forward.down" not in packed[weight_format]


def test_a_bias_stays_as_loaded(tmp_path: Path) -> None:
    config = widened(CONFIGS["openflamingo"])
    text = replace(config.language_model, qkv_bias=True, output_bias=True, ffn_bias=True)
    folder = saved(replace(config, language_model=text), tmp_path / "model")
    model = load_folder(folder, "cpu", torch.float32, weight_format="int8")
    layer = model.get_submodule("language_model.layers.0.attention.qkv")
    assert isinstance(layer, Int8Linear)
    expected = tiny_model(model.config).state_dict()["language_model.layers.0.attention.qkv.bias"]
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ unpacked(layer).T + expected)
    assert expected.any()


@pytest.mark.parametrize("weight_format", KINDS)
def test_no_two_unpacked_matrices_are_held_while_loading(
    weight_format: WeightFormat, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that has room for the packed model only may hold one matrix more."""
    packed = packed_layers(load_folder(folder, "cpu", torch.float32, weight_format=weight_format))
    read: list[weakref.ref[Tensor]] = []
    stock = SafetensorsFiles.part

    def watched(self: SafetensorsFiles, name: str, part: Part | None) -> Tensor:
        assert not any(reference() is not None for reference in read), f"another matrix is held next to {name}"
        tensor = stock(self, name, part)
        if name.removesuffix(".weight") in packed:
            read.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(SafetensorsFiles, "part", watched)
    load_folder(folder, "cpu", torch.float32, weight_format=weight_format)
    assert len(read) == len(packed) > 10
