"""Few-shot requests to a whole server with a tiny model: it selects shots by the model's features."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.media import MediaLimits, load_image, resize
from model.vision import normalise
from tests.server.conftest import data_url, image_part, png
from tests.server.test_main import Server, running, until
from tests.tiny_models import CONFIGS, tiny_model

CONFIG = CONFIGS["openflamingo"]
COLOURS = ("red", "green", "blue", "white", "navy", "yellow", "orange", "brown")
IMAGES = {colour: png(colour, (20, 10 + index)) for index, colour in enumerate(COLOURS)}
QUERY = png("purple")
QUERY_FIELDS = {"image": data_url(QUERY)}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(model_folder, tmp_path_factory.mktemp("log") / "log", "-m", "server") as server:
        examples = [
            {"id": colour, "image": data_url(data), "text": f"{colour}.", "label": colour}
            for colour, data in IMAGES.items()
        ]
        post(server, "/v1/support_sets", name="colours", examples=examples)
        yield server


def post(server: Server, path: str, **fields: Any) -> dict[str, Any]:
    response = server.http.post(path, json=fields)
    assert response.is_success, response.text
    body: dict[str, Any] = response.json()
    return body


@pytest.fixture(scope="module")
def similarities() -> dict[str, float]:
    """Return the similarity of each image to the query, computed with the model itself."""
    model = tiny_model(CONFIG)

    def vector(data: bytes) -> np.ndarray:
        frame = torch.from_numpy(resize(load_image(data, MediaLimits()), CONFIG.vision).copy())
        with torch.inference_mode():
            features = model.features(normalise(frame[None], CONFIG.vision)[None])  # [1, 1, P, Dv]
        pooled = features.float().mean((0, 1, 2)).numpy()
        return np.asarray(pooled / np.linalg.norm(pooled))

    return {colour: float(vector(data) @ vector(QUERY)) for colour, data in IMAGES.items()}


def test_a_search_ranks_by_the_models_features(server: Server, similarities: dict[str, float]) -> None:
    hits = post(server, "/v1/support_sets/colours/search", query=QUERY_FIELDS, k=len(COLOURS))["data"]
    assert {hit["id"]: hit["score"] for hit in hits} == pytest.approx(similarities, abs=1e-5)
    scores = [hit["score"] for hit in hits]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] - scores[-1] > 1e-3  # otherwise the ranking would prove nothing


def test_an_answer_equals_that_of_a_handwritten_prompt(server: Server, similarities: dict[str, float]) -> None:
    examples = {"support_set": "colours", "k": 3, "strategy": "rices_image"}
    body = post(server, "/v1/fewshot/completions", query=QUERY_FIELDS, examples=examples, **GREEDY)
    shot_ids = [shot["id"] for shot in body["fewshot"]["shots"]]
    assert shot_ids == sorted(similarities, key=lambda colour: similarities[colour])[-3:]
    parts: list[dict[str, object]] = []
    for colour in shot_ids:
        text: dict[str, object] = {"type": "text", "text": f"Output:{colour}."}
        parts += [image_part(IMAGES[colour]), text, {"type": "end_of_chunk"}, {"type": "text", "text": "\n"}]
    prompt = [*parts, image_part(QUERY), {"type": "text", "text": "Output:"}]
    assert body["choices"] == server.complete(prompt=prompt, **GREEDY)["choices"]
    assert body["choices"][0]["token_ids"]
    details = body["usage"]["fewshot_details"]
    assert (details["media"], details["shots_used"], details["version"]) == (4, 3, 1)


def test_embedded_media_are_not_encoded_again(server: Server) -> None:
    examples = {"support_set": "colours", "k": 8, "strategy": "rices_image"}
    post(server, "/v1/support_sets/colours/search", query=QUERY_FIELDS)
    body = post(server, "/v1/fewshot/completions", query=QUERY_FIELDS, examples=examples)
    details = body["usage"]["fewshot_details"]
    assert (details["media"], details["media_encoded"], details["media_cached"]) == (9, 0, 9)


def test_shots_of_a_warm_set_that_attend_alone_are_reused_whatever_is_selected(server: Server) -> None:
    fields = {"template": "caption", "shots_attend": "alone", "wait": True}
    warm = post(server, "/v1/support_sets/colours/warm", **fields)["warm"]
    assert warm["shots"] == len(COLOURS)
    config, size = CONFIG.language_model, 4
    bytes_per_token = 4 * config.num_layers * 2 * config.num_kv_heads * config.head_dim
    # a marker, the text of the template with the colour, the end of the chunk
    num_blocks = sum(-(-(1 + len(f"Output:{colour}.\n") + 1) // size) for colour in COLOURS)
    assert warm["shot_bytes"] == num_blocks * size * bytes_per_token
    answers: list[dict[str, Any]] = []
    for strategy, order, k in (("rices_image", None, 5), ("rices_image", "shuffled", 5), ("random", None, 3)):
        examples = {"support_set": "colours", "k": k, "strategy": strategy, "order": order}
        new = {"image": data_url(png("pink", (9, 9 + len(answers) // 2)))}
        body = post(
            server, "/v1/fewshot/completions", query=new, examples=examples, shots_attend="alone", logprobs=0, **GREEDY
        )
        answers.append(body)
        usage = body["usage"]
        assert usage["fewshot_details"]["shots_attend"] == "alone"
        query = 1 + len("Output:")  # of which blocks are cached when it is sent again
        assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - query
        assert usage["fewshot_details"]["media_encoded"] <= 1
    ordered, shuffled, _ = answers
    assert [shot["id"] for shot in ordered["fewshot"]["shots"]] != [shot["id"] for shot in shuffled["fewshot"]["shots"]]
    assert ordered["choices"][0]["token_ids"] == shuffled["choices"][0]["token_ids"]
    assert ordered["choices"][0]["logprobs"] == shuffled["choices"][0]["logprobs"]
    assert server.http.patch("/v1/support_sets/colours", json={"pinned": True}).is_success
    until(lambda: server.metric("kv_cache_pinned_bytes") == warm["shot_bytes"])
    assert server.http.patch("/v1/support_sets/colours", json={"pinned": False}).is_success
    until(lambda: server.metric("kv_cache_pinned_bytes") == 0)


def test_a_text_search_needs_no_images(server: Server) -> None:
    fields = {"query": {"text": "brown."}, "strategy": "rices_text", "k": 2}
    best, second = post(server, "/v1/support_sets/colours/search", **fields)["data"]
    assert best["id"] == "brown"
    assert best["score"] == pytest.approx(1, abs=1e-5)
    assert second["score"] < 1 - 1e-3


def test_a_restarted_server_has_its_vectors_and_selects_the_same_shots(model_folder: Path, tmp_path: Path) -> None:
    search = {"query": QUERY_FIELDS, "k": 8}
    examples = [{"id": colour, "image": data_url(data), "text": colour} for colour, data in IMAGES.items()]
    with running(model_folder, tmp_path / "log", "-m", "server") as first:
        post(first, "/v1/support_sets", name="colours", examples=examples)
        before = post(first, "/v1/support_sets/colours/search", **search)
        first.process.kill()
    with running(model_folder, tmp_path / "log", "-m", "server") as second:
        assert post(second, "/v1/support_sets/colours/search", **search) == before
        selection = {"support_set": "colours", "k": 8, "strategy": "rices_image"}
        body = post(second, "/v1/fewshot/completions", query=QUERY_FIELDS, examples=selection)
        details = body["usage"]["fewshot_details"]
        # the search has encoded only the query: this worker has not encoded the examples yet
        assert (details["media_encoded"], details["media_cached"]) == (8, 1)
