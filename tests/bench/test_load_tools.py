"""Tests of the commands of the load tools and of the parsing of their reports, with a fake tool that writes a report."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.driver import BenchFailed
from bench.load_tools import CASES, QUICK, TOOLS, Case, Load, _parser, install, run
from bench.options import as_settings, parse
from bench.table import ROOT

LOAD = Load(
    url="http://127.0.0.1:1",
    model="tiny",
    tokenizer=Path("/models/tiny"),
    num_requests=4,
    num_clients=2,
    prompt_tokens=16,
    new_tokens=8,
)
IMAGES = Case(route="chat/completions", num_images=2, is_stream=True)
GUIDELLM = {
    "benchmarks": [
        {
            "metrics": {
                "request_totals": {"successful": 3, "errored": 1},
                "request_latency": {"successful": {"median": 0.5}},
                "time_to_first_token_ms": {"successful": {"median": 20.0}},
            }
        }
    ]
}
AIPERF = {
    "request_count": {"avg": 3.0},
    "completed_request_count": {"avg": 4.0},
    "request_latency": {"p50": 500.0},
    "time_to_first_token": {"p50": 20.0},
}


def fake_tool(folder: Path, file: str, report: dict[str, Any], status: int = 0) -> Path:
    """Create a tool that writes a report to a file and exits with a status."""
    binary = folder / "tool"
    code = (
        f"#!{sys.executable}\nimport pathlib, sys\n"
        f"pathlib.Path({file!r}).write_text({json.dumps(report)!r})\nprint('out of luck')\nsys.exit({status})\n"
    )
    binary.write_text(code)
    binary.chmod(0o755)
    return binary


@pytest.mark.parametrize(
    ("tool", "file", "report"),
    [("guidellm", "report.json", GUIDELLM), ("aiperf", "profile_export_aiperf.json", AIPERF)],
)
def test_a_row_holds_the_counts_of_the_tool(tool: str, file: str, report: dict[str, Any], tmp_path: Path) -> None:
    row = run(tool, fake_tool(tmp_path, file, report), IMAGES, LOAD)
    assert row == {"answered": 3, "failed": 1, "latency ms": 500.0, "first token ms": 20.0}


def test_a_failing_tool_raises_with_its_output(tmp_path: Path) -> None:
    with pytest.raises(BenchFailed, match="out of luck"):
        run("aiperf", fake_tool(tmp_path, "x", {}, status=3), IMAGES, LOAD)


def test_an_installed_tool_is_not_installed_again(tmp_path: Path) -> None:
    (tmp_path / "guidellm" / "bin").mkdir(parents=True)
    binary = fake_tool(tmp_path / "guidellm" / "bin", "x", {}).rename(tmp_path / "guidellm" / "bin" / "guidellm")
    assert install("guidellm", ["guidellm[vision]"], tmp_path) == binary


@pytest.mark.parametrize("tool", TOOLS)
def test_a_command_contains_the_details_of_its_case(tool: str) -> None:
    command, _ = TOOLS[tool]
    commands = [" ".join(command(case, LOAD, Path("/out"))) for case in CASES]
    assert len(set(commands)) == len(CASES)
    for case, line in zip(CASES, commands, strict=True):
        assert LOAD.url in line
        assert str(LOAD.tokenizer) in line
        assert ("image" in line) == bool(case.num_images)
        assert ("--streaming" in line or "stream=true" in line) == case.is_stream


def test_aiperf_requests_answers_with_a_text() -> None:
    """It counts one without as failed: eight ends of chunks, which `ignore_eos` permits."""
    command, _ = TOOLS["aiperf"]
    lines = [" ".join(command(case, LOAD, Path("/out"))) for case in CASES if case.route != "embeddings"]
    assert all("--extra-inputs min_tokens:8" in line and "ignore_eos" not in line for line in lines)


def test_the_page_of_clients_has_the_command_of_aiperf() -> None:
    page = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    _, command_line = page.split("\naiperf profile ", 1)
    words = shlex.split(command_line.partition("```")[0].replace("\\\n", ""))
    load = replace(LOAD, url="http://localhost:8000", model="flamboyance-lite", tokenizer=Path("$MODEL"), new_tokens=4)
    unlisted = {"--workers-max", "1", "--ui", "simple", "--artifact-dir", "/out", "profile"}
    command, _ = TOOLS["aiperf"]
    assert set(command(IMAGES, load, Path("/out"))) - unlisted == set(words)


@pytest.mark.parametrize(("tools", "expected"), [([], []), (["aiperf"], ["aiperf"])])
def test_the_options_can_be_written_to_the_last_line(tools: list[str], expected: list[str]) -> None:
    options = parse(_parser(), [*tools, "--requests", "3"], QUICK)
    settings = json.loads(json.dumps(as_settings(options)))
    assert (settings["tools"], settings["requests"]) == (expected, 3)
