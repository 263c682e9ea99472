"""Support sets of a whole server outlive its worker and itself, and pinned sets are warm in each new worker."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from tests.server.conftest import data_url, png
from tests.server.test_main import Server, running, until

SETS = "/v1/support_sets"
COLOURS = ("red", "blue")


def example(colour: str) -> dict[str, Any]:
    return {"id": colour, "image": data_url(png(colour)), "text": colour}


def get_card(server: Server) -> dict[str, Any]:
    card: dict[str, Any] = server.http.get(f"{SETS}/colours").json()
    return card


def complete(server: Server, colour: str) -> dict[str, Any]:
    query = {"image": data_url(png(colour))}
    fields = {"examples": {"support_set": "colours", "k": 2}, "query": query, "max_tokens": 1}
    response = server.http.post("/v1/fewshot/completions", json=fields)
    assert response.status_code == 200, response.text
    usage: dict[str, Any] = response.json()["usage"]
    return usage


def test_a_pinned_set_outlives_worker_and_server(model_folder: Path, tmp_path: Path) -> None:
    with running(model_folder, tmp_path / "log", "-m", "server") as server:
        fields = {"name": "colours", "examples": [example(colour) for colour in COLOURS], "pinned": True}
        response = server.http.post(SETS, json=fields)
        assert response.status_code == 200, response.text
        until(lambda: server.metric("media_slots_pinned") == len(COLOURS))
        until(lambda: get_card(server)["status"] == "ready")
        assert get_card(server)["warm"]["media_encoded"] == len(COLOURS)
        assert complete(server, "green")["fewshot_details"]["media_encoded"] == 1

        os.kill(server.worker, signal.SIGKILL)
        until(lambda: server.metric("engine_restarts_total") == 1 and server.readiness() == 200)
        until(lambda: server.metric("media_slots_pinned") == len(COLOURS))
        until(lambda: get_card(server)["status"] == "ready")
        assert complete(server, "yellow")["fewshot_details"]["media_encoded"] == 1
        before = get_card(server)
        server.process.kill()
        server.process.wait()

    with running(model_folder, tmp_path / "log", "-m", "server") as server:
        until(lambda: server.metric("media_slots_pinned") == len(COLOURS))
        until(lambda: get_card(server)["status"] == "ready")
        assert get_card(server) == before
        assert server.http.patch(f"{SETS}/colours", json={"pinned": False}).json()["version"] == 1
        until(lambda: server.metric("media_slots_pinned") == 0)
        warm = server.http.post(f"{SETS}/colours/warm", json={"wait": True, "template": "caption", "k": 2}).json()
        assert (warm["status"], warm["warm"]["media_encoded"]) == ("ready", 0)
        assert complete(server, "black")["prompt_tokens_details"]["cached_tokens"] > 0
        media = server.http.get(f"{SETS}/colours/examples/red").json()["media"][0]["image_id"]
        assert server.http.delete(f"/v1/images/{media}").status_code == 409
        assert server.http.delete(f"{SETS}/colours").json()["deleted"]
        assert server.stop() == 0
