"""Building an engine: startup fails if a requested backend or format cannot run; the warm-up leaves the engine empty."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import backend, decode_attention, launch_files, paged_attention_cpu, paged_attention_loop
from kernels.backend import Launch, launch_config
from kernels.compiled import OnDemand
from model.batch import Batch
from model.config import AlonePositions
from model.folder import save_folder
from model.inference import prepare_for_inference
from model.products import FLOAT32, ROUNDED, Format
from model.ranks import ALONE, Rank
from server.engine import build as build_module
from server.engine.build import (
    WARM_UP_DIGEST,
    _load_launches,
    _recorder,
    _vision_formats,
    build,
    engine_limits,
    warm_up,
)
from server.engine.device.runner import Launched
from server.engine.engine import Engine
from server.engine.plan import Plan
from server.served_model import ServedModel
from server.settings import Settings, SettingsError
from tests.engine_client import (
    CONFIG,
    FEW_SHOT,
    IMAGE_TOKEN,
    IMAGES,
    Client,
    Prompt,
    assert_all_released,
    assert_equals_reference,
    client,
)
from tests.tiny_models import (
    CONFIGS,
    FAMILIES,
    Family,
    byte_tokenizer,
    prompt_tokenizer,
    tiny_model,
    with_alone_positions,
)


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


@pytest.fixture
def launches_of_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file with launches for the GPU that this machine seems to have, whose name it has."""
    table = dict(backend.TABLE)
    for module in (backend, launch_files):
        monkeypatch.setattr(module, "architecture", lambda: "sm_90")
        monkeypatch.setattr(module, "TABLE", table)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
    monkeypatch.setattr(build_module, "shipped_file", lambda card: launch_files.shipped_file(card, tmp_path))
    key = {"operator": "paged_decode", "architecture": "sm_90", "head_dim": 128, "dtype": "bfloat16"}
    file = tmp_path / "a-card.json"
    file.write_text(json.dumps([{**key, "block": 16, "num_warps": 8, "num_stages": 5}]))
    return file


@pytest.mark.parametrize("is_named", [True, False])
def test_the_launches_of_the_card_are_loaded(
    is_named: bool, launches_of_a_card: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file = launches_of_a_card.rename(launches_of_a_card.with_name("other.json")) if is_named else launches_of_a_card
    settings = Settings(kernel_launches=file if is_named else None)
    assert _load_launches(settings, torch.device("cuda")) == file
    assert launch_config("paged_decode", 128, torch.bfloat16) == Launch(16, 8, 5)
    assert f"kernel launches: {file} has 1 for this GPU" in caplog.text


@pytest.mark.usefixtures("launches_of_a_card")
def test_a_card_without_a_file_has_the_launches_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another Card")
    before = dict(backend.TABLE)
    assert _load_launches(Settings(), torch.device("cuda")) is None
    assert before == backend.TABLE


def test_a_bad_file_of_launches_ends_the_start(launches_of_a_card: Path) -> None:
    launches_of_a_card.write_text("{}")
    with pytest.raises(SettingsError, match=r"^kernel_launches: .*a-card\.json contains a dict, not a list"):
        _load_launches(Settings(), torch.device("cuda"))


def test_launches_that_nothing_would_read_are_refused(launches_of_a_card: Path) -> None:
    settings = Settings(kernel_launches=launches_of_a_card, kernels="reference")
    with pytest.raises(SettingsError, match=r"^kernel_launches: .* kernels of a GPU, and kernels is reference$"):
        _load_launches(settings, torch.device("cuda"))


def test_kernels_that_cannot_run_here_are_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_obstacle", lambda: "torch sees no GPU")
    with pytest.raises(SettingsError, match=r"^kernels: .* was requested, but torch sees no GPU; auto "):
        build(Settings(model=folder, kernels="triton"))


@pytest.mark.parametrize("endpoint", [None, "http://127.0.0.1:4318"])
def test_the_engine_reports_encoding_only_to_a_collector(folder: str, endpoint: str | None) -> None:
    settings = Settings(model=folder, device="cpu", otlp_endpoint=endpoint)
    assert engine_limits(ServedModel.load(settings), settings).reports_encoding == (endpoint is not None)


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


def test_the_encoder_is_rounded_only_if_the_settings_allow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_bfloat16 in (False, True):
        monkeypatch.setattr(backend, "has_bfloat16", lambda has_bfloat16=has_bfloat16: has_bfloat16)
        assert _vision_formats(Settings()) == (FLOAT32 + ROUNDED if has_bfloat16 else FLOAT32)
    assert _vision_formats(Settings(dtype="float32")) == FLOAT32
    assert _vision_formats(Settings(vision_format="native")) == FLOAT32
    assert _vision_formats(Settings(dtype="float32", vision_format="bfloat16")) == ROUNDED


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_model_len", [16, 128])
@pytest.mark.parametrize("alone_positions", ["restart", "in_a_row"])
def test_the_warm_up_ends_and_leaves_nothing(
    family: Family, max_model_len: int, alone_positions: AlonePositions
) -> None:
    answer = client(family, replace(CONFIG, max_model_len=max_model_len), alone_positions)
    engine = answer.engine
    warm_up(engine, IMAGE_TOKEN, image_size=8)
    assert not engine.has_work()
    assert engine.media.content_keys.get(WARM_UP_DIGEST) is not None
    assert engine.blocks.find(b"") is None
    assert not engine.blocks._hash_of
    assert engine.scheduler.pace.fixed == 0, "the first steps compile, and later ones would be expected to take as long"
    assert engine.scheduler.pace._met == -inf, "the first request of a client would take short steps"
    assert_all_released(engine)


def test_a_prompt_is_computed_while_another_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = client("flamingo").engine
    kinds: list[set[bool]] = []
    launch = engine.runner.launch

    def watched(plan: Plan) -> Launched:
        kinds.append({row.count > 1 for row in plan.rows})
        return launch(plan)

    monkeypatch.setattr(engine.runner, "launch", watched)
    warm_up(engine, IMAGE_TOKEN, image_size=8)
    assert {True, False} in kinds
    assert {False} in kinds


def test_prefill_and_decode_with_offsets_are_part_of_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = client("idefics", alone_positions="in_a_row").engine
    num_queries: set[int] = set()
    forward = engine.runner._forward

    def watched(batch: Batch) -> Tensor:
        if batch.block_offsets is not None:
            num_queries.update(batch.query_starts.diff()[batch.block_offsets.any(1)].tolist())
        return forward(batch)

    monkeypatch.setattr(engine.runner, "_forward", watched)
    warm_up(engine, IMAGE_TOKEN, image_size=8)
    assert 1 in num_queries
    assert max(num_queries) > 16, "fewer tokens go through the kernel of decoding rows"


@pytest.mark.parametrize("alone_positions", ["restart", "in_a_row"])
@pytest.mark.parametrize("formats", [(), FLOAT32])
def test_no_step_after_the_warm_up_compiles_attention(
    formats: tuple[Format, ...], alone_positions: AlonePositions, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = [(paged_attention_loop, "_attend_rows"), (decode_attention, "_rotate_store_attend")]
    for module, name in loops:
        monkeypatch.setattr(module, name, OnDemand(getattr(module, name)._build))
    monkeypatch.setattr(paged_attention_cpu, "MAX_LOOP_PRODUCTS", 1000)
    model = prepare_for_inference(tiny_model(with_alone_positions(CONFIGS["idefics"], alone_positions)), formats)
    answer = Client(Engine(model, prompt_tokenizer(), CONFIG), dict(IMAGES))
    warm_up(answer.engine, IMAGE_TOKEN, image_size=8)
    compiled = [set(getattr(module, name)) for module, name in loops]
    assert [len(sizes) for sizes in compiled] == [2, 2 if formats else 0]
    answer.engine.add(FEW_SHOT.request("decodes"))
    while not answer.tokens:
        answer.step()
    answer.engine.add(Prompt(((1, 90),)).request("long"))  # its pieces run next to a decoding row
    answer.run()
    answer.engine.add(Prompt(((0, 4), (1, 5), (2, 3)), shots_attend="alone", step=0).request("alone"))
    answer.run()
    assert [set(getattr(module, name)) for module, name in loops] == compiled


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


@pytest.mark.parametrize(
    ("kernels", "device", "rank", "is_recorded"),
    [
        ("auto", "cuda", ALONE, True),
        ("reference", "cuda", ALONE, False),
        ("auto", "cpu", ALONE, False),
        ("auto", "cuda", Rank(0, 2), False),
    ],
)
def test_steps_are_recorded_with_the_kernels_of_a_gpu_only(
    kernels: backend.Backend, device: str, rank: Rank, is_recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's operators read tables on the host, which cannot be recorded."""
    monkeypatch.setattr(backend, "_obstacle", lambda: None)
    monkeypatch.setattr(build_module, "CudaRecorder", object)
    backend.select(kernels)
    recorder = _recorder(CONFIGS["idefics"], torch.device(device), rank)
    backend.select("auto")
    assert (recorder is not None) == is_recorded
