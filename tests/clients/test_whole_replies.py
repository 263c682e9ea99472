"""Tests of embeddings, scores and inspections on a socket, with a real engine of a tiny model."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from openai import OpenAI, UnprocessableEntityError
from PIL import Image

from tests.clients.serving import CONFIG, KEY


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
        yield http


def image(colour: str) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.new("RGB", (9, 7), colour).save(stream, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"},
    }


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def post(http: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    response = http.post(path, json=fields)
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def test_texts_are_embedded(client: OpenAI) -> None:
    base64_reply = client.embeddings.create(
        model=CONFIG.name, input=["a cat", "a dog", "a cat"]
    )  # the client requests base64
    float_reply = client.embeddings.create(model=CONFIG.name, input=["a cat", "a dog"], encoding_format="float")
    vectors = np.array([item.embedding for item in base64_reply.data])
    assert vectors.shape == (3, CONFIG.language_model.dim)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-5)
    assert float(vectors[0] @ vectors[1]) < 0.9999
    assert np.array([item.embedding for item in float_reply.data]) == pytest.approx(vectors[:2], abs=1e-5)
    assert base64_reply.usage.total_tokens == 15
    with pytest.raises(UnprocessableEntityError, match="dimensions"):
        client.embeddings.create(model=CONFIG.name, input="a", dimensions=4)


def test_media_are_embedded_and_encoded_once(http: httpx.Client) -> None:
    reply = post(http, "/v1/embeddings", input=[image("orange"), image("teal"), image("orange")])
    vectors = np.array([item["embedding"] for item in reply["data"]])
    assert vectors.shape == (3, CONFIG.vision.feature_dim)
    assert vectors[0] == pytest.approx(vectors[2])
    assert vectors[0] != pytest.approx(vectors[1], abs=1e-3)
    prompt = [image("teal"), text("A"), image("orange"), text("B")]
    details = post(http, "/v1/completions", prompt=prompt, max_tokens=1)["usage"]["fewshot_details"]
    assert (details["media_encoded"], details["media_cached"]) == (0, 2)


def test_a_score_equals_the_log_probabilities_of_the_echoed_prompt(http: httpx.Client) -> None:
    prompt, candidate = [image("navy"), text("Output:")], " a cat"
    scored = post(http, "/v1/score", prompt=prompt, candidates=[candidate, "b"])["data"][0]
    whole = [prompt[0], text("Output:" + candidate)]
    echoed = post(http, "/v1/completions", prompt=whole, max_tokens=0, echo=True, logprobs=0)["choices"][0]
    count = scored["num_tokens"]
    assert scored["token_logprobs"] == pytest.approx(echoed["logprobs"]["token_logprobs"][-count:], abs=1e-4)


def test_an_inspection_returns_gates_and_the_attention_of_a_token(http: httpx.Client) -> None:
    prompt = [text("x"), image("red"), text("A"), image("lime"), text("B")]
    reply = post(http, "/v1/inspect", prompt=prompt, answer=" cat")
    assert [token["media"] for token in reply["tokens"]] == [None, 0, 0, 1, 1, 1, 1, 1, 1]
    assert (reply["token"], reply["num_prompt_tokens"]) == (8, 5)
    assert [gate["layer"] for gate in reply["gates"]] == list(CONFIG.gated_layers)
    assert all(0.4 < gate["attention"] < 1 for gate in reply["gates"])  # though they are folded into the weights
    (attention,) = reply["attention"]
    assert attention["layers"] == list(CONFIG.gated_layers)
    assert sum(attention["visual_tokens"]) == pytest.approx(1, abs=1e-5)
    assert np.array(attention["grid"]).shape == (1, 2, 2)
    assert np.array(attention["grid"]).sum() == pytest.approx(1, abs=1e-5)
    single = post(http, "/v1/inspect", prompt=prompt, token=2, layers=[CONFIG.gated_layers[0]])
    assert single["attention"][0]["layers"] == [CONFIG.gated_layers[0]]
    assert post(http, "/v1/inspect", prompt=prompt, token=0)["attention"] == []


def test_a_stop_string_does_not_change_the_text_before_it(http: httpx.Client) -> None:
    free = post(http, "/v1/completions", prompt="x", n=2, max_tokens=200, ignore_eos=True, seed=3, temperature=1.5)
    stop = free["choices"][0]["text"][3:5]
    cut = post(
        http, "/v1/completions", prompt="x", n=2, max_tokens=200, ignore_eos=True, seed=3, temperature=1.5, stop=stop
    )
    for whole, part in zip(free["choices"], cut["choices"], strict=True):
        assert whole["text"].startswith(part["text"])
    assert cut["choices"][0]["finish_reason"] == "stop"
