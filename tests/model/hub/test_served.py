"""`python -m server --model NAME` downloads, imports and serves a model; a wrong name ends it with status 2."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from safetensors.torch import load_file

from server.settings import Settings
from server.start import main, with_model
from tests.model.checkpoint.test_openflamingo import GOLDENS
from tests.model.hub.repositories import REDPAJAMA
from tests.model.hub.stand_in import StandIn
from tests.server.conftest import image_part, png
from tests.server.test_imported import assert_completion, openflamingo_part
from tests.server.test_main import running


@pytest.fixture
def server_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty cache of servers that a test starts."""
    monkeypatch.setenv("FLAMBOYANCE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_openflamingo_is_served_by_name(published: StandIn, server_cache: Path, tmp_path: Path) -> None:
    cases = json.loads((GOLDENS / "gpt_neox" / "expected.json").read_text())
    stored = load_file(GOLDENS / "gpt_neox" / "expected.safetensors")
    with running(Path(REDPAJAMA), tmp_path / "log", "-m", "server") as server:
        expected = cases["several_shots"]
        parts = [openflamingo_part(*segment) for segment in expected["segments"]]
        assert_completion(server, parts, stored["several_shots"], expected["token_ids"], expected["greedy"])
        (card,) = server.http.get("/v1/models").json()["data"]
    assert card["id"] == REDPAJAMA
    assert [(source["part"], source["license"]) for source in card["sources"]] == [
        ("checkpoint", "mit"),
        ("language model", "not stated"),
        ("vision model", "not stated"),
    ]
    assert card["sources"][0]["commit"] == published.repositories[REDPAJAMA].revisions["main"]
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    assert any(line["message"].startswith(f"checkpoint: {REDPAJAMA} at commit") for line in lines)


def test_an_idefics_is_served_by_name_without_loading_torch_to_find_it(
    hub: StandIn, idefics: Path, server_cache: Path, tmp_path: Path
) -> None:
    commit = hub.publish("HuggingFaceM4/idefics-9b-instruct", idefics)
    name = f"HuggingFaceM4/idefics-9b-instruct@{commit}"
    with running(Path(name), tmp_path / "log", "-m", "server") as server:
        parts = [image_part(png("red", (32, 32))), {"type": "text", "text": "a red"}]
        body = server.complete(prompt=parts, max_tokens=3, temperature=0, ignore_eos=True)
        assert body["model"] == "HuggingFaceM4/idefics-9b-instruct"
        assert body["usage"]["completion_tokens"] == 3
    hub.requests.clear()
    settings = with_model(Settings(model=name, cache_dir=server_cache))
    assert settings.model == str(next(server_cache.glob("HuggingFaceM4--idefics-9b-instruct-*")))
    assert hub.requests == []


def test_an_unknown_name_ends_the_server_with_status_2(
    hub: StandIn, server_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        assert main(["--model", "me/absent"]) == 2
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
    assert "error: model: me/absent is not a folder, and http://" in capsys.readouterr().err
