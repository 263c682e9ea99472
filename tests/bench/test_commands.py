"""Every benchmark runs, at toy sizes, as a user starts it; its last line is JSON with the rows it promises."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest

from bench.table import ROOT

SECONDS = 600


def last_line(*command: str) -> dict[str, Any]:
    finished = subprocess.run(
        [sys.executable, "-m", *command, "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    assert found.keys() == {"title", "machine", "settings", "rows", "bars", "seconds"}
    assert found["settings"]["quick"] is True
    return found


def bars(found: dict[str, Any]) -> list[str]:
    return [bar["name"] for bar in found["bars"]]


def test_offline() -> None:
    found = last_line("bench.offline")
    assert [row["clients"] for row in found["rows"]] == [1, 4]
    for row in found["rows"]:
        assert row["tokens/s"] > 0
        assert row["first token p50 ms"] <= row["first token p99 ms"]


def test_scheduler() -> None:
    found = last_line("bench.scheduler")
    assert [row["sequences"] for row in found["rows"]] == [1, 8]
    assert all(0 < row["schedule"] < row["step"] <= row["p90"] <= row["most"] for row in found["rows"])


def test_http() -> None:
    found = last_line("bench.http")
    assert bars(found) == ["server / engine at 2 clients"]
    assert found["rows"][0].keys() == {"clients", "engine tokens/s", "server tokens/s", "server / engine", "seen"}


def test_fewshot() -> None:
    found = last_line("bench.fewshot")
    assert bars(found) == [
        f"first token, 4 shots, {chosen}, new picture / no shots"
        for chosen in ("first", "rices_image", "rices_image stored")
    ]
    rows = {(row["what"], row["picture"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == 18
    assert all(row["ms"] > 0 for row in rows.values())
    assert rows["first token, 0 shots", "new"]["cached"] == 0
    # the warm shots were found computed, and so they were where similarity chose them, in the set's order
    for chosen in ("first", "rices_image stored"):
        row = rows[f"first token, 4 shots, {chosen}", "new"]
        assert row["prompt tokens"] - row["cached"] < rows["first token, 0 shots", "new"]["prompt tokens"] + 16
    assert ("classify, 4 shots, first", "seen") in rows
    assert ("first token, 4 shots, rices_image, cold", "new") in rows


def test_idefics_and_ours_answer_alike() -> None:
    found = last_line("bench.peer", "idefics")
    measured = [row["what"] for row in found["rows"]]
    assert "first token ms, 2 shots, warm" in measured
    assert "decode tokens/s, 2 shots" in measured
    assert "tokens/s, 2 shots, engine, 2 clients" in measured
    assert "tokens/s, 2 shots, server, 2 clients" in measured
    assert "tokens/s, 2 shots, peer, perceived, batch 2" in measured
    agreement = found["bars"][-1]
    assert agreement["name"] == "the peer's greedy tokens are ours"
    assert agreement["is_met"]


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama.cpp takes minutes to compile and is not in the dev extra: pip install '.[bench]'",
)
def test_llamacpp() -> None:
    found = last_line("bench.peer", "llamacpp")
    assert [row["what"] for row in found["rows"]] == ["decode, batch 1", "decode, batch 8", "prefill, 32 tokens"]
    assert len(found["bars"]) == 3


def test_an_unknown_peer_is_named_with_those_that_are_known() -> None:
    command = [sys.executable, "-m", "bench.peer", "nobody"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "{idefics,llamacpp}" in finished.stderr
