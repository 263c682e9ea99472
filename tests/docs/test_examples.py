"""The scripts of docs/examples do what they say, against a real server of a tiny model."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint.native import save_folder
from tests.server.conftest import picture
from tests.server.test_main import ROOT, Server, running
from tests.tiny_models import CONFIGS, byte_tokenizer, tiny_model

CONFIG = CONFIGS["openflamingo"]
EXAMPLES = ROOT / "docs" / "examples"
SECONDS = 120


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_folder(folder, CONFIG, tiny_model(CONFIG).state_dict().items(), byte_tokenizer().to_str())
    with running(folder, tmp_path_factory.mktemp("log") / "log", "-m", "server") as server:
        yield server


def run(script: str, server: Server, *arguments: str) -> list[str]:
    """Lines of what it prints."""
    done = start(script, server, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def start(script: str, server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(EXAMPLES / script), str(server.http.base_url).rstrip("/"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


def answers(lines: list[str]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    warmed, evaluation, found = map(json.loads, lines)
    assert warmed["status"] == "ready"
    assert evaluation["status"] == "completed"
    assert evaluation["recommendation"]["examples"]["strategy"] in ("first", "rices_image")
    return warmed, evaluation, found


def test_a_support_set_of_the_photographs(server: Server) -> None:
    warmed, _, found = answers(run("support_set.sh", server))
    assert warmed["label_counts"] == {"alive": 2, "made": 2}
    assert found["label"] in ("alive", "made")
    assert len(found["fewshot"]["shots"]) == 4


def test_a_support_set_of_a_folder_by_label(server: Server, tmp_path: Path) -> None:
    for place, colour in enumerate(("red", "green", "blue", "white")):
        file = tmp_path / "its pictures" / ("warm" if colour == "red" else "not so warm") / f"{colour} one.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(colour, (20, 10 + place)))
    query = tmp_path / "query.jpg"
    query.write_bytes(picture("purple"))
    warmed, _, found = answers(run("support_set.sh", server, str(tmp_path / "its pictures"), str(query)))
    assert warmed["label_counts"] == {"warm": 1, "not so warm": 3}
    assert {candidate["label"] for candidate in found["candidates"]} == {"warm", "not so warm"}


def test_a_refusal_ends_the_script_and_is_shown(server: Server, tmp_path: Path) -> None:
    query = tmp_path / "query.jpg"
    query.write_bytes(b"no picture")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.jpg").write_bytes(b"no picture")
    done = start("support_set.sh", server, str(tmp_path), str(query))
    assert done.returncode == 1
    assert "invalid_media" in done.stderr


def test_an_answer_behind_three_photographs(server: Server) -> None:
    assert "data: [DONE]" in run("fewshot.sh", server)
