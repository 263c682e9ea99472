"""Measured weight formats are found again on the same machine, and nowhere else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import format_memory, products
from model.cpu import ENCODER_ROWS, ROWS, Choices
from model.format_memory import DISTURBED_SECONDS, FormatMemory, ProcessorTime, processor
from tests.tiny_models import CONFIGS

CONFIG = CONFIGS["idefics"]
CHOICES: Choices = {
    "64x32 of int4/bfloat16": {1: "int4", 4: "int4", 8: "bfloat16", 16: "int4", 32: "bfloat16"},
    "vision 64x32 of float32/onednn": {ENCODER_ROWS: "onednn"},
}


def stored(folder: Path) -> FormatMemory:
    memory = FormatMemory.of(folder, CONFIG)
    memory.save(CHOICES)
    return memory


def test_choices_are_remembered_by_machine_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FormatMemory.of(tmp_path, CONFIG).load() == {}
    stored(tmp_path / "formats")
    assert FormatMemory.of(tmp_path / "formats", CONFIG).load() == CHOICES
    assert FormatMemory.of(tmp_path / "formats", replace(CONFIG, name="other")).load() == {}
    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_num_threads", lambda: 77)
        assert FormatMemory.of(tmp_path / "formats", CONFIG).load() == {}
    monkeypatch.setattr(format_memory, "processor", lambda: "another")
    assert FormatMemory.of(tmp_path / "formats", CONFIG).load() == {}


def test_choices_belong_to_the_kernels_that_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FormatMemory.of(tmp_path, CONFIG).save(CHOICES)
    monkeypatch.setattr(products, "instruction_names", lambda: ["another", None])
    assert FormatMemory.of(tmp_path, CONFIG).load() == {}
    monkeypatch.undo()
    assert FormatMemory.of(tmp_path, CONFIG).load() == CHOICES


def test_other_formats_of_a_model_are_added(tmp_path: Path) -> None:
    memory = stored(tmp_path)
    more: Choices = {"64x32 of int8/bfloat16": dict.fromkeys(ROWS, "int8")}
    memory.save(more)
    assert memory.load() == CHOICES | more
    assert [path.name for path in tmp_path.iterdir()] == [memory.file.name]


def in_content(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Return a damage that changes the parsed content of a file."""

    def damage(content: bytes) -> bytes:
        parsed = json.loads(content)
        change(parsed)
        return json.dumps(parsed).encode()

    return damage


def test_what_was_measured_next_to_other_programs_is_remembered_for_an_hour(tmp_path: Path) -> None:
    now = 1000.0
    memory = replace(FormatMemory.of(tmp_path, CONFIG), clock=lambda: now)
    memory.save(CHOICES, is_disturbed=True)
    now += DISTURBED_SECONDS - 1
    assert memory.load() == CHOICES
    now += 1
    assert memory.load() == {}
    memory.save(CHOICES)
    now += 10 * DISTURBED_SECONDS
    assert memory.load() == CHOICES


def test_other_formats_do_not_prolong_what_was_measured_next_to_other_programs(tmp_path: Path) -> None:
    now = 1000.0
    memory = replace(FormatMemory.of(tmp_path, CONFIG), clock=lambda: now)
    memory.save(CHOICES, is_disturbed=True)
    now += DISTURBED_SECONDS - 1
    memory.save({"64x32 of int8": dict.fromkeys(ROWS, "int8")})
    memory.save({"64x32 of bfloat16": dict.fromkeys(ROWS, "bfloat16")}, is_disturbed=True)
    assert len(memory.load()) == len(CHOICES) + 2
    now += 1
    assert memory.load() == {}


def test_a_measurement_that_waits_for_the_processor_is_disturbed() -> None:
    processor_time = ProcessorTime()
    time.sleep(0.2)
    assert processor_time.is_disturbed(1)
    assert not ProcessorTime(began=time.perf_counter() - 1, used=time.process_time() - 0.9).is_disturbed(1)
    assert ProcessorTime(began=time.perf_counter() - 1, used=time.process_time() - 0.9).is_disturbed(2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-20],
        lambda content: b"\xff" + content,
        lambda content: b"[]",
        lambda content: b"{}",
        in_content(lambda parsed: parsed["identity"].update(torch="0.1")),
        in_content(lambda parsed: parsed.update(formats=[1])),
        in_content(lambda parsed: parsed.update(expires="soon")),
        in_content(lambda parsed: parsed["formats"].update({"64x32 of int4/bfloat16": {"1": "int4"}})),
        in_content(lambda parsed: parsed["formats"]["64x32 of int4/bfloat16"].update({"8": "int8"})),
        in_content(lambda parsed: parsed["formats"]["64x32 of int4/bfloat16"].update({"8": ["int4"]})),
        in_content(lambda parsed: parsed["formats"].update({"64x32 of gone": dict.fromkeys(map(str, ROWS), "gone")})),
    ],
)
def test_a_damaged_file_is_ignored_and_written_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    memory = stored(tmp_path)
    memory.file.write_bytes(damage(memory.file.read_bytes()))
    assert memory.load() == {}
    memory.save(CHOICES)
    assert memory.load() == CHOICES


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    memory = FormatMemory.of(tmp_path / "file", CONFIG)
    memory.save(CHOICES)
    assert memory.load() == {}


def test_a_processor_is_identified_by_its_instruction_sets() -> None:
    assert torch.backends.cpu.get_cpu_capability() in processor()
