"""Two whole servers with a tiny model, one of which proposes tokens: the same answers, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from model.folder import save_folder
from tests.server.conftest import image_part, png
from tests.server.test_main import Server, running
from tests.tiny_models import CONFIGS, byte_tokenizer, tiny_model

CONFIG = CONFIGS["openflamingo"]
PROMPT = [
    image_part(png("red")),
    {"type": "text", "text": "red."},
    image_part(png("blue")),
    {"type": "text", "text": "b"},
]
GREEDY: dict[str, Any] = {"prompt": PROMPT, "temperature": 0, "max_tokens": 60, "ignore_eos": True, "logprobs": 1}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """Yield a server with proposals and one without."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_folder(folder, CONFIG, tiny_model(CONFIG).state_dict().items(), byte_tokenizer().to_str())
    serve = "-m", "server", "--speculative-tokens"
    with (
        running(folder, tmp_path_factory.mktemp("with") / "log", *serve, "8") as with_proposals,
        running(folder, tmp_path_factory.mktemp("without") / "log", *serve, "0") as without,
    ):
        yield with_proposals, without


def complete(server: Server, **fields: Any) -> dict[str, Any]:
    response = server.http.post("/v1/completions", json={**GREEDY, **fields})
    assert response.is_success, response.text
    body: dict[str, Any] = response.json()
    return body


def choice_and_usage(body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the choice without its log-probabilities, which differ by rounding, and the usage of tokens."""
    (choice,) = body["choices"]
    tokens = choice.pop("logprobs")["tokens"]
    counts = {name: body["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return {**choice, "tokens": tokens}, counts


def test_answers_are_the_same_up_to_stop_strings_and_lengths(servers: tuple[Server, Server]) -> None:
    with_proposals, without = servers
    whole = complete(without)
    tokens = whole["choices"][0]["logprobs"]["tokens"]
    accepted = 0
    ascii_tokens = [token for token in tokens if token.isascii() and token.isprintable()]
    stops = [{"stop": token} for token in dict.fromkeys(ascii_tokens)]
    for fields in ({}, {"max_tokens": 23}, *stops):
        body, expected = complete(with_proposals, **fields), complete(without, **fields)
        assert "completion_tokens_details" not in expected["usage"]
        accepted += body["usage"].get("completion_tokens_details", {}).get("accepted_prediction_tokens", 0)
        assert choice_and_usage(body) == choice_and_usage(expected)
    assert accepted > 0


def test_a_stream_has_the_same_chunks(servers: tuple[Server, Server]) -> None:
    def chunks(server: Server) -> list[tuple[str, str | None]]:
        text = server.http.post("/v1/completions", json={**GREEDY, "stream": True}).text
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
        return [(c["text"], c["finish_reason"]) for line in lines for c in json.loads(line)["choices"]]

    with_proposals, without = servers
    assert chunks(with_proposals) == chunks(without)
    assert "spec_decode_num_accepted_tokens_total" in with_proposals.http.get("/metrics").text
