"""The format of the weights is what the settings say, or is refused by name; packed models answer as the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import backend
from model.folder import load_folder, save_folder
from model.inference import prepare_for_inference
from model.presets.published import MODELS
from model.products import FLOAT32
from model.quantised import KINDS, QuantisedLinear, WeightFormat
from model.reference import generate
from server.engine.build import build
from server.engine.device.memory import GIB
from server.engine.device.weight_formats import WeightFormats
from server.engine.engine import Engine
from server.engine.ranks.division import check_memory
from server.settings import Settings, SettingsError
from tests.engine_client import CONFIG, FEW_SHOT, IMAGE_TOKEN, IMAGES, Client, assert_all_released
from tests.tiny_models import CONFIGS, FAMILIES, Family, byte_tokenizer, prompt_tokenizer, tiny_model, widened

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WIDE = widened(CONFIGS["openflamingo"])
NARROW = replace(CONFIGS["flamingo"], gated=replace(CONFIGS["flamingo"].gated, ffn_dim=48))
Q4 = replace(WIDE, language_model=replace(WIDE.language_model, weights="q4"))


@pytest.fixture
def selected() -> Iterator[None]:
    """Let a test choose the backend of the process."""
    yield
    backend.select("auto")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))


def formats(device: torch.device, dtype: torch.dtype = torch.bfloat16, **values: Any) -> WeightFormats:
    return WeightFormats.of(Settings.model_validate(values), WIDE, device, dtype)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", KINDS)
def test_a_gpu_has_packed_weights(name: WeightFormat) -> None:
    assert formats(GPU, weight_format=name) == WeightFormats(name, packed=name)


def test_auto_and_native_are_the_dtype() -> None:
    for value in ("auto", "native"):
        assert formats(GPU, weight_format=value) == WeightFormats()
        assert formats(CPU, weight_format=value) == WeightFormats()
        assert formats(CPU, torch.float32, weight_format=value) == WeightFormats(layers=FLOAT32)
        assert formats(CPU, torch.float32, weight_format=value, tensor_parallel=2) == WeightFormats()
    assert WeightFormats.of(Settings(), Q4, GPU, torch.bfloat16) == WeightFormats()


def test_a_cpu_keeps_the_four_bits_of_a_model_unless_a_dtype_is_set() -> None:
    int4 = WeightFormats("int4", layers=("int4", "bfloat16"))
    assert WeightFormats.of(Settings(), Q4, CPU, torch.float32) == int4
    assert WeightFormats.of(Settings(dtype="float32"), Q4, CPU, torch.float32) == WeightFormats(layers=FLOAT32)
    assert formats(CPU, weight_format="int4") == int4


@pytest.mark.parametrize(
    ("capability", "message"),
    [
        (
            (8, 0),
            "weight_format: fp8 needs a GPU of compute capability 8.9, and this one has 8.0; auto, int4, int8 and native",
        ),
        ((7, 5), "weight_format: fp8 needs a GPU of compute capability 8.9, and this one has 7.5"),
    ],
)
def test_fp8_is_refused_on_a_gpu_without_it(
    capability: tuple[int, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    with pytest.raises(SettingsError, match=f"^{message}"):
        formats(GPU, weight_format="fp8")
    assert formats(GPU, weight_format="int4").packed == "int4"


def test_fp8_is_refused_on_gpus_of_other_makers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.hip", "7.0")
    with pytest.raises(SettingsError, match=r"^weight_format: fp8 is for GPUs of NVIDIA; auto, int4, int8 and native"):
        formats(GPU, weight_format="fp8")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        ({"weight_format": "fp8"}, torch.float16, "fp8 needs dtype bfloat16, not float16"),
        ({"weight_format": "int8"}, torch.float32, "int8 needs dtype bfloat16 or float16, not float32"),
        ({"weight_format": "int4"}, torch.float32, "int4 needs dtype bfloat16 or float16, not float32"),
    ],
)
def test_a_dtype_that_a_kernel_does_not_take_is_refused(
    values: dict[str, str], dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(SettingsError, match=f"^weight_format: {message}$"):
        formats(GPU, dtype, **values)


@pytest.mark.usefixtures("hopper")
def test_a_model_that_is_too_narrow_is_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"^weight_format: int8 does not support tiny-flamingo: its matrices are too narrow$"
    ):
        WeightFormats.of(Settings(weight_format="int8"), NARROW, GPU, torch.bfloat16)


@pytest.mark.usefixtures("selected")
def test_fp8_is_refused_on_a_cpu(tmp_path: Path) -> None:
    save_folder(tmp_path / "model", WIDE, tiny_model(WIDE).state_dict().items(), byte_tokenizer().to_str())
    settings = Settings(model=str(tmp_path / "model"), cache_dir=tmp_path, device="cpu", weight_format="fp8")
    with pytest.raises(
        SettingsError, match=r"^weight_format: fp8 is for a GPU, and the device is cpu; auto, int4, int8 and"
    ):
        build(settings)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_a_packed_model_equal_the_reference(
    family: Family, name: WeightFormat, tmp_path: Path
) -> None:
    config = widened(CONFIGS[family])
    save_folder(tmp_path / "model", config, tiny_model(config).state_dict().items(), byte_tokenizer().to_str())
    model, served = (load_folder(tmp_path / "model", "cpu", torch.float32, weight_format=name) for _ in range(2))
    prepared = prepare_for_inference(served)
    model.fold_gates()
    request, pixels = FEW_SHOT.request("a"), FEW_SHOT.pixels(model)
    expected = generate(
        model, request.prompt.token_ids, request.prompt.media_index, pixels, max_tokens=6, suppressed_ids=[IMAGE_TOKEN]
    )
    answer = Client(Engine(prepared, prompt_tokenizer(), CONFIG), dict(IMAGES))
    answer.engine.add(request)
    answer.run()
    assert answer.ids("a") == expected.token_ids
    assert_all_released(answer.engine)


@pytest.mark.usefixtures("selected")
def test_the_engine_is_built_with_packed_weights_where_the_formats_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything between the settings and the engine, on a CPU that pretends to have the format of a GPU."""
    monkeypatch.setattr(WeightFormats, "of", lambda *arguments: WeightFormats("int4", packed="int4"))
    save_folder(tmp_path / "model", WIDE, tiny_model(WIDE).state_dict().items(), byte_tokenizer().to_str())
    settings = Settings(model=str(tmp_path / "model"), cache_dir=tmp_path, device="cpu", dtype="bfloat16")
    engine, info = build(settings)
    assert info["weight_format"] == "int4"
    assert info["dtype"] == "bfloat16"
    packed = [layer for layer in engine.runner.model.modules() if isinstance(layer, QuantisedLinear)]
    assert len(packed) == 4 * WIDE.language_model.num_layers + 4 * len(WIDE.gated_layers)


def test_the_check_of_a_gpus_memory_counts_packed_weights() -> None:
    config = MODELS["openflamingo-9b"]
    with pytest.raises(SettingsError, match=r"must hold 15.* GiB of weights, and the first has 12.0 GiB"):
        check_memory(config, torch.bfloat16, 1, 12 * GIB, None)
    check_memory(config, torch.bfloat16, 1, 12 * GIB, "fp8")


def test_more_gpus_are_no_advice_with_a_format_that_they_refuse() -> None:
    config = MODELS["openflamingo-9b"]
    with pytest.raises(SettingsError, match=r"the first has 7\.0 GiB; 4 are enough$"):
        check_memory(config, torch.bfloat16, 1, 7 * GIB, None)
    with pytest.raises(SettingsError, match=r"and the first has 7\.0 GiB$"):
        check_memory(config, torch.bfloat16, 1, 7 * GIB, "int8")
