"""Building an engine: startup fails if a requested backend or format cannot run; the warm-up leaves the engine empty."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from kernels import backend
from model.cpu import FLOAT32, ROUNDED
from model.folder import save_folder
from server.engine.build import WARM_UP_DIGEST, _vision_formats, build, warm_up
from server.engine.plan import Plan
from server.engine.sampler import Result
from server.settings import Settings, SettingsError
from tests.engine_client import CONFIG, FEW_SHOT, IMAGE_TOKEN, assert_all_released, assert_equals_reference, client
from tests.tiny_models import CONFIGS, FAMILIES, Family, byte_tokenizer, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[str]:
    config = CONFIGS["openflamingo"]
    save_folder(tmp_path / "model", config, tiny_model(config).state_dict().items(), byte_tokenizer().to_str())
    yield str(tmp_path / "model")
    backend.select("auto")


def test_the_requested_backend_is_used_and_reported(folder: str) -> None:
    _, info = build(Settings(model=folder, cache_dir=Path(folder).parent, device="cpu", kernels="reference"))
    assert info["backend"]["requested"] == "reference"
    assert info["backend"]["backend"] == "reference"
    assert info["dtype"] == "float32"
    assert info["weight_formats"]


@pytest.mark.parametrize("is_open", [False, True])
def test_a_model_whose_gates_are_closed_is_reported(
    is_open: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = tiny_model(CONFIGS["openflamingo"]).state_dict()
    gates = [name for name in tensors if name.endswith("_gate")]
    for name in gates[is_open:]:
        tensors[name].zero_()
    save_folder(tmp_path / "model", CONFIGS["openflamingo"], tensors.items(), byte_tokenizer().to_str())
    build(Settings(model=str(tmp_path / "model"), cache_dir=tmp_path, device="cpu"))
    assert ("the gates are closed" in caplog.text) is not is_open


def test_kernels_that_cannot_run_here_are_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_obstacle", lambda: "torch sees no GPU")
    with pytest.raises(SettingsError, match=r"^kernels: .* was requested, but torch sees no GPU; auto "):
        build(Settings(model=folder, kernels="triton"))


def test_a_format_of_the_cpu_gives_the_engine_its_dtype(folder: str) -> None:
    engine, info = build(Settings(model=folder, cache_dir=Path(folder).parent, device="cpu", weight_format="int8"))
    assert info["dtype"] == "bfloat16"
    assert str(engine.runner.dtype) == "torch.bfloat16"


def test_a_format_of_the_cpu_goes_with_any_dtype(folder: str) -> None:
    settings = Settings(
        model=folder, cache_dir=Path(folder).parent, device="cpu", dtype="bfloat16", weight_format="int8"
    )
    _, info = build(settings)
    assert info["dtype"] == "bfloat16"


def test_the_encoder_is_rounded_only_if_the_settings_allow_it() -> None:
    assert _vision_formats(Settings()) == FLOAT32 + ROUNDED
    assert _vision_formats(Settings(dtype="float32")) == FLOAT32
    assert _vision_formats(Settings(vision_format="native")) == FLOAT32
    assert _vision_formats(Settings(dtype="float32", vision_format="bfloat16")) == ROUNDED


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_model_len", [16, 128])
def test_the_warm_up_ends_and_leaves_nothing(family: Family, max_model_len: int) -> None:
    answer = client(family, replace(CONFIG, max_model_len=max_model_len))
    engine = answer.engine
    warm_up(engine, IMAGE_TOKEN, image_size=8)
    assert not engine.has_work()
    assert engine.media.content_keys.get(WARM_UP_DIGEST) is not None
    assert engine.blocks.find(b"") is None
    assert not engine.blocks._hash_of
    assert engine.scheduler.pace.fixed == 0, "the first steps compile, and later ones would be expected to take as long"
    assert engine.scheduler._met == -inf, "the first request of a client would take short steps"
    assert_all_released(engine)


def test_a_prompt_is_computed_while_another_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = client("flamingo").engine
    kinds: list[set[bool]] = []
    run = engine.runner.run

    def watched(plan: Plan) -> list[Result]:
        kinds.append({row.count > 1 for row in plan.rows})
        return run(plan)

    monkeypatch.setattr(engine.runner, "run", watched)
    warm_up(engine, IMAGE_TOKEN, image_size=8)
    assert {True, False} in kinds
    assert {False} in kinds


def test_answers_after_the_warm_up_equal_the_reference() -> None:
    answer = client("idefics")
    warm_up(answer.engine, IMAGE_TOKEN, image_size=8)
    answer.engine.add(FEW_SHOT.request("a"))
    answer.run()
    assert_equals_reference("idefics", FEW_SHOT, answer, "a")


def nothing_to_measure(groups: Mapping[str, object], sizes: Sequence[int]) -> dict[str, object]:
    assert not groups
    return {}


def test_weight_formats_are_measured_once(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(model=folder, cache_dir=Path(folder).parent, device="cpu", weight_format="int8")
    measured = build(settings)[1]["weight_formats"]
    with monkeypatch.context() as patched:
        patched.setattr("model.cpu.measure", nothing_to_measure)
        assert build(settings)[1]["weight_formats"] == measured
    for file in (Path(folder).parent / "formats").iterdir():
        file.unlink()
    assert build(settings)[1]["weight_formats"].keys() == measured.keys()
