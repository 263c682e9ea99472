"""The caches of a GPU fill what the weights and the largest step leave; the refusal of what does not fit says how much."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from kernels import backend
from model.folder import save_folder
from model.footprint import page_bytes
from server.engine import build as module
from server.engine.build import block_bytes, build
from server.engine.config import DEVICE_LIMITS, EngineConfig
from server.engine.device.largest_step import LargestStep
from server.engine.device.memory import GIB, MIB, CacheBytes, Room, divide
from server.engine.device.runner import Launched, Runner
from server.engine.device.sampler import logit_positions
from server.engine.plan import Plan
from server.served_model import ServedModel
from server.settings import Settings, SettingsError
from tests.engine_client import CONFIG, SERVED
from tests.tiny_models import CONFIGS, FAMILIES, Family, byte_tokenizer, prompt_tokenizer, tiny_model


@dataclass
class FakeMemory:
    """A device on which 100 MiB are used and steps take 10 MiB each; the work is done, as on the device."""

    size: int = 200 * MIB
    peaks: list[int] = field(default_factory=list)

    def total(self) -> int:
        return self.size

    def used(self) -> int:
        return 100 * MIB

    def peak_of(self, work: Callable[[], object]) -> int:
        work()
        self.peaks.append(10 * MIB)
        return 10 * MIB


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[str]:
    config = CONFIGS["openflamingo"]
    save_folder(tmp_path / "model", config, tiny_model(config).state_dict().items(), byte_tokenizer().to_str())
    yield str(tmp_path / "model")
    backend.select("auto")


def settings(folder: str, **values: object) -> Settings:
    return Settings.model_validate({"model": folder, "cache_dir": Path(folder).parent, "device": "cpu", **values})


def test_the_caches_fill_what_is_left(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = FakeMemory()
    monkeypatch.setattr(module, "_device_memory", lambda device, rank: memory)
    engine, info = build(settings(folder, memory_fraction=0.6, block_size=1))
    assert memory.peaks == [10 * MIB]  # on a CPU no step is recorded
    # 120 MiB, less 100 in use and 10 of the step
    block, page = (
        block_bytes(CONFIGS["openflamingo"], 1, torch.float32),
        page_bytes(CONFIGS["openflamingo"], torch.float32),
    )
    assert info["num_media_slots"] == (10 * MIB // 4) // page
    assert info["num_blocks"] == (10 * MIB - 10 * MIB // 4) // block
    assert engine.config.num_blocks == info["num_blocks"]


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_device_memory", lambda device, rank: FakeMemory(size=100 * MIB))
    monkeypatch.setattr(module, "_load", None)
    message = (
        r"^model: its weights take 0\.0 GiB; of 0\.1 GiB, 1 of the device's memory, 0\.1 GiB are in use: 0\.0 GiB are"
    )
    with pytest.raises(SettingsError, match=message):
        build(settings(folder, memory_fraction=1))


ROOM = Room(total=80 * GIB, fraction=0.9, used=16 * GIB, step=4 * GIB, graphs=2 * GIB)


@pytest.mark.parametrize(
    ("values", "caches"),
    [
        ({}, CacheBytes(text=37 * GIB + GIB // 2, media=12 * GIB + GIB // 2)),
        ({"kv_cache_mb": 1024}, CacheBytes(text=GIB, media=49 * GIB)),
        ({"media_cache_mb": 1024}, CacheBytes(text=49 * GIB, media=GIB)),
        ({"kv_cache_mb": 2048, "media_cache_mb": 1024}, CacheBytes(text=2 * GIB, media=GIB)),
    ],
)
def test_both_caches_have_what_is_left_unless_they_are_set(values: dict[str, int], caches: CacheBytes) -> None:
    assert divide(ROOM, Settings(**values), longest=GIB, page=MIB) == caches


def test_the_longest_request_fits_before_media_have_their_share() -> None:
    assert divide(ROOM, Settings(), longest=45 * GIB, page=MIB) == CacheBytes(text=45 * GIB, media=5 * GIB)
    assert divide(ROOM, Settings(), longest=GIB, page=20 * GIB) == CacheBytes(text=30 * GIB, media=20 * GIB)


@pytest.mark.parametrize(
    ("values", "longest", "missing"),
    [({}, 60, "10.5"), ({"kv_cache_mb": 60 * 1024}, 1, "10.5"), ({"media_cache_mb": 50 * 1024}, 1, "1.0")],
)
def test_what_is_missing_is_stated(values: dict[str, int], longest: int, missing: str) -> None:
    with pytest.raises(SettingsError, match=rf"^memory_fraction: of 72\.0 GiB, .* {missing} GiB are missing; lower"):
        divide(ROOM, Settings(**values), longest=longest * GIB, page=GIB // 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_largest_step_reaches_every_limit(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    plans, launch = list[Plan](), Runner.launch

    def watched(self: Runner, plan: Plan) -> Launched:
        plans.append(plan)
        return launch(self, plan)

    monkeypatch.setattr(Runner, "launch", watched)
    largest = LargestStep(SERVED[family], prompt_tokenizer(), CONFIG)
    largest.run()
    largest.decode()
    step, decode = plans
    assert sum(row.count for row in step.rows) == CONFIG.max_tokens_per_step
    assert sum(len(logit_positions(row)) for row in step.rows) == CONFIG.max_tokens_per_step
    assert len(step.rows) == len(decode.rows) == CONFIG.max_sequences
    assert {row.start + row.count for row in (*step.rows, *decode.rows)} == {CONFIG.max_model_len}
    assert sum(piece.count for piece in step.pieces) == CONFIG.max_frames_idle
    assert all(len(logit_positions(row)) == row.count == 1 for row in decode.rows)
    # blocks that all rows share would be gathered once
    tables = (zip(*(row.sequence.block_table for row in plan.rows), strict=True) for plan in plans)
    assert all(len(set(column)) > 1 for table in tables for column in table)


def test_a_gpu_has_limits_of_its_own(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = ServedModel.load(settings(folder))
    on_cpu = module.engine_limits(served, settings(folder))
    assert (on_cpu.max_sequences, on_cpu.max_tokens_per_step, on_cpu.max_frames_per_step) == (64, 512, 2)
    assert on_cpu.block_size == 4
    assert {name: getattr(EngineConfig(), name) for name in ("max_sequences", "max_frames_idle")} == {
        name: getattr(DEVICE_LIMITS["cpu"], name) for name in ("max_sequences", "max_frames_idle")
    }
    monkeypatch.setattr(module, "_device", lambda settings: torch.device("cuda"))
    on_gpu = module.engine_limits(served, settings(folder, max_num_seqs=7))
    assert (on_gpu.max_sequences, on_gpu.max_tokens_per_step, on_gpu.max_frames_per_step) == (7, 2048, 16)
    assert on_gpu.block_size == 16
