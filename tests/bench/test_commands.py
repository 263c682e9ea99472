"""Tests that every benchmark command runs at toy sizes, and that its last line is JSON with the expected rows."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest

from bench.table import ROOT

TIMEOUT_SECONDS = 600


def run_quick(*command: str) -> dict[str, Any]:
    """Run a command with `--quick` and return the report in its last line."""
    process = subprocess.run(
        [sys.executable, "-m", *command, "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    report: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    assert report.keys() == {"title", "machine", "settings", "rows", "bars", "seconds"}
    assert report["settings"]["quick"] is True
    return report


def bar_names(report: dict[str, Any]) -> list[str]:
    return [bar["name"] for bar in report["bars"]]


def test_offline() -> None:
    report = run_quick("bench.offline")
    assert [row["clients"] for row in report["rows"]] == [1, 4]
    for row in report["rows"]:
        assert row["tokens/s"] > 0
        assert row["first token p50 ms"] <= row["first token p99 ms"]


def test_speculation() -> None:
    report = run_quick("bench.speculation")
    assert [(row["case"], row["batch"]) for row in report["rows"]] == [
        (case, batch)
        for case in ("captions, 1 shots", "answers, 1 shots", "forms, 1 shots", "text")
        for batch in (1, 2)
    ]
    assert all(0 <= row["accepted"] <= row["proposed"] for row in report["rows"])
    assert all(
        row["same answers"] == 1 for row in report["rows"]
    )  # a tiny model has one format for all numbers of rows
    assert len(report["bars"]) == len(report["rows"])


def test_scheduler() -> None:
    report = run_quick("bench.scheduler")
    assert [row["sequences"] for row in report["rows"]] == [1, 8]
    assert all(0 < row["schedule"] < row["step"] <= row["p90"] <= row["max"] for row in report["rows"])


def test_contexts() -> None:
    report = run_quick("bench.contexts")
    assert [(row["sequences"], row["context"]) for row in report["rows"]] == [(1, 24), (2, 24)]
    assert all(row["loop tokens/s"] > 0 and row["products tokens/s"] > 0 for row in report["rows"])


def test_nodes() -> None:
    (row,) = run_quick("bench.nodes")["rows"]
    assert (row["model"], row["rows"]) == ("tiny", 1)
    # 4 layers with two norms, rotation and store, two kernels of attention, and SwiGLU; 2 gated layers with two norms, one
    # kernel of attention, and SwiGLU; the last norm
    assert row["Triton"] == 4 * (2 + 1 + 2 + 1) + 2 * (2 + 1 + 1) + 1
    assert row["nodes"] == row["Triton"] + row["torch"]


def test_floors() -> None:
    report = run_quick("bench.floors")
    (row,) = report["rows"]
    assert (row["model"], row["sequences"]) == ("OF-3B", 1)
    assert row["floor ms"] < row["estimate ms"] <= row["without L2 ms"]
    assert row["estimate ms"] > row["launches ms"] > 0
    assert bar_names(report) == ["OF-3B, 1 sequences"]


def test_tenants() -> None:
    report = run_quick("bench.tenants")
    assert [(row["caches"], row["input"]) for row in report["rows"]] == [
        ("of each tenant", "picture"),
        ("of each tenant", "upload"),
        ("shared by the operator", "picture"),
        ("shared by the operator", "upload"),
    ]
    assert all(0 <= row["p"] <= 1 for row in report["rows"])
    assert bar_names(report) == ["hits, picture, caches of each tenant", "hits, picture, caches shared by the operator"]
    assert all(bar["is_met"] for bar in report["bars"])


def test_soak() -> None:
    report = run_quick("bench.soak")
    missed = [bar["name"] for bar in report["bars"] if not bar["is_met"]]
    assert missed == []
    assert sum(row["process"].startswith("worker") for row in report["rows"]) == 1
    assert report["settings"]["requests answered"] > 0
    assert report["settings"]["requests cancelled"] > 0


def test_http() -> None:
    report = run_quick("bench.http")
    assert bar_names(report) == ["server / engine at 2 clients"]
    assert report["rows"][0].keys() == {"clients", "engine tokens/s", "server tokens/s", "server / engine", "range"}


def test_neighbours() -> None:
    report = run_quick("bench.neighbours")
    assert [row["busy programs"] for row in report["rows"]] == [0, 1]
    assert all(row["all threads, s"] > 0 and row["chosen threads, s"] > 0 for row in report["rows"])


def test_checkouts() -> None:
    report = run_quick("bench.checkouts", str(ROOT))
    assert bar_names(report) == ["after / before at 2 clients"]
    assert all(row["before tokens/s"] > 0 and row["after tokens/s"] > 0 for row in report["rows"])


def test_fewshot() -> None:
    report = run_quick("bench.fewshot")
    assert bar_names(report) == [
        f"first token, 4 shots, {strategy}, new image / no shots"
        for strategy in ("first", "rices_image", "rices_image stored")
    ] + [
        f"{measure}, 4 shots of 12, rices_image, attend alone, new image / cached prefix"
        for measure in ("first token", "classify")
    ] + [name for name in bar_names(report) if name.startswith("requests/s of 16 clients")]
    rows = {(row["case"], row["image"]): row for row in report["rows"] if "ms" in row}
    rates = [row["requests/s"] for row in report["rows"] if "requests/s" in row]
    assert len(rows) + len(rates) == len(report["rows"]) == 28
    assert len(rates) == 4
    assert min(rates) > 0
    assert report["settings"]["KiB per shot that attends alone"] > 0
    assert all(row["ms"] > 0 for row in rows.values())
    assert rows["first token, 0 shots", "new"]["cached"] == 0
    # The warm shots are cached, also those that similarity selects when they keep the order of the support set.
    for strategy in ("first", "rices_image stored"):
        row = rows[f"first token, 4 shots, {strategy}", "new"]
        assert row["prompt tokens"] - row["cached"] < rows["first token, 0 shots", "new"]["prompt tokens"] + 16
    # the query alone is computed after shots that attend alone, whichever they are
    row = rows["first token, 4 shots of 12, rices_image, attend alone", "new"]
    assert row["prompt tokens"] - row["cached"] < rows["first token, 0 shots", "new"]["prompt tokens"] + 16
    assert ("classify, 4 shots, first", "seen") in rows
    assert ("first token, 4 shots, rices_image, cold", "new") in rows


def test_idefics_gives_the_same_tokens() -> None:
    report = run_quick("bench.peer", "idefics")
    cases = [row["case"] for row in report["rows"]]
    assert "first token ms, 2 shots, warm" in cases
    assert "decode tokens/s, 2 shots" in cases
    assert "tokens/s, 2 shots, engine, 2 clients" in cases
    assert "tokens/s, 2 shots, server, 2 clients" in cases
    assert "tokens/s, 2 shots, peer, perceived, batch 2" in cases
    agreement = report["bars"][-1]
    assert agreement["name"] == "greedy tokens equal the peer's"
    assert agreement["is_met"]


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama.cpp takes minutes to compile and is not in the dev extra: pip install '.[bench]'",
)
def test_llamacpp() -> None:
    report = run_quick("bench.peer", "llamacpp")
    assert [row["case"] for row in report["rows"]] == ["decode, batch 1", "decode, batch 8", "prefill, 32 tokens"]
    assert len(report["bars"]) == 3


def test_start() -> None:
    small = ["max_model_len=256", "kv_cache_mb=1", "media_cache_mb=1", "host_media_mb=1"]
    report = run_quick("bench.start", "--full", "--set", *small)
    seconds = {row["what"]: row["seconds"] for row in report["rows"] if "seconds" in row}
    assert 0 < seconds["worker spawned"] < seconds["ready"] < seconds["first answer"]
    resident = {row["what"]: row["RSS MB"] for row in report["rows"] if "RSS MB" in row}
    assert {"API, at rest", "worker, at rest", "spare worker 1, at rest"} <= resident.keys()
    assert resident["worker, at rest"] < resident["worker, full caches"]
    written = {row["what"]: row["written MB"] for row in report["rows"] if "written MB" in row}
    full = pytest.approx(1.05, rel=0.01)  # MB in a cache of 1 MiB
    assert written == {
        "text cache": full,
        "media cache": full,
        "visual tokens": full,
        "pooled features": pytest.approx(0.52, rel=0.01),  # 4,096 vectors of 32 floats
    }
    assert bar_names(report) == ["first answer equals that of the warm-up start"]


def test_an_unknown_peer_prints_the_known_peers() -> None:
    command = [sys.executable, "-m", "bench.peer", "unknown"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "{idefics,llamacpp}" in process.stderr


def test_a_peer_that_is_not_installed_is_named_with_its_package() -> None:
    hide = "import runpy, sys; sys.modules['llama_cpp'] = None; sys.argv = ['', 'llamacpp']"
    command = [sys.executable, "-c", f"{hide}; runpy.run_module('bench.peer', run_name='__main__')"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "llama_cpp" in process.stderr
    assert "pip install llama-cpp-python" in process.stderr
    assert "Traceback" not in process.stderr
