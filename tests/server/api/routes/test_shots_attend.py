"""The field `shots_attend` as clients see it: every route with shots passes it to the engine, or refuses it by name."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import httpx
import pytest

from model.prompt import EncodedPrompt
from server.settings import Settings
from server.store.records import SupportSetInfo
from tests.server.colours import IMAGES, app, application, colours, post, settings, support_sets, url
from tests.server.conftest import image_part
from tests.server.fakes import CONFIG, FakeClient

__all__ = ["app", "colours", "settings", "support_sets"]  # fixtures

pytestmark = pytest.mark.anyio

SHOTS: list[dict[str, Any]] = [
    {"id": "one", "image": url(IMAGES[0]), "answer": "warm"},
    {"id": "two", "image": url(IMAGES[1]), "answer": "cold"},
]
PARTS = [image_part(IMAGES[0].data), {"type": "text", "text": "warm"}, image_part(IMAGES[1].data)]
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": PARTS},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": PARTS}]},
    "/v1/fewshot/completions": {"shots": SHOTS, "query": {"image": url(IMAGES[2])}},
    "/v1/classify": {"shots": SHOTS, "query": {"image": url(IMAGES[2])}, "method": "in_context"},
    "/v1/score": {"prompt": PARTS, "candidates": ["a", "b"]},
    "/v1/decisions": {
        "shots": SHOTS,
        "input": [{"role": "user", "content": [{"type": "input_image", "image_url": url(IMAGES[2])}]}],
        "questions": [
            {"type": "choice", "instructions": "Which?", "choices": [{"value": "warm"}, {"value": "cold"}]},
        ],
        "method": "in_context",
    },
}


@pytest.mark.parametrize("path", REQUESTS)
async def test_every_route_with_shots_passes_the_form_on_and_reports_it(
    path: str, http: httpx.AsyncClient, client: FakeClient
) -> None:
    forms: list[tuple[str, str | None]] = []
    for fields in ({}, {"shots_attend": "previous"}, {"shots_attend": "alone"}):
        response = await http.post(path, json={**REQUESTS[path], **fields})
        assert response.status_code == 200, response.text
        prompt = (client.requests or client.scores)[-1].prompt
        forms.append((prompt.shots_attend, response.json()["usage"]["fewshot_details"].get("shots_attend")))
    assert forms == [("previous", None), ("previous", None), ("alone", "alone")]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "log-probabilities": ("/v1/completions", {"prompt_logprobs": 0}, "prompt_logprobs"),
    "an echo with log-probabilities": ("/v1/completions", {"echo": True, "logprobs": 0}, "echo"),
    "shots without media": ("/v1/fewshot/completions", {"zero_shot": True}, "shots_attend"),
    "a text before the image": (
        "/v1/fewshot/completions",
        {"template": {"shot": "Look: {media}{answer}"}},
        "shots_attend",
    ),
    "two images in a shot": (
        "/v1/fewshot/completions",
        {"shots": [{"media": [image_part(), image_part()], "text": "warm"}]},
        "shots_attend",
    ),
    "a query without an image": (
        "/v1/fewshot/completions",
        {
            "query": {"question": "?"},
            "template": {"shot": "{question} {answer}"},
            "shots": [{"question": "?", "text": "a"}],
        },
        "shots_attend",
    ),
    "a query with a text before its image": (
        "/v1/decisions",
        {
            "input": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "Look:"},
                        {"type": "input_image", "image_url": url(IMAGES[2])},
                    ],
                }
            ]
        },
        "shots_attend",
    ),
    "a query without content that has no image": (
        "/v1/classify",
        {"calibration": "contextual", "content_free": "no_media"},
        "shots_attend",
    ),
    "a method without a prompt": ("/v1/classify", {"method": "nearest_mean"}, "shots_attend"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_has_no_meaning_is_refused_by_name(case: str, http: httpx.AsyncClient) -> None:
    path, fields, param = REFUSED[case]
    response = await http.post(path, json={**REQUESTS[path], **fields, "shots_attend": "alone"})
    assert response.status_code in (400, 422), response.text
    assert response.json()["error"]["param"] == param
    accepted = await http.post(path, json={**REQUESTS[path], **fields})
    assert accepted.status_code == 200, accepted.text


async def test_one_image_without_shots_has_both_forms(http: httpx.AsyncClient) -> None:
    fields = {"prompt": PARTS[:2], "prompt_logprobs": 0, "shots_attend": "alone", "max_tokens": 0}
    response = await http.post("/v1/completions", json=fields)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("path", REQUESTS)
async def test_a_model_whose_text_reads_all_media_refuses_it(path: str, client: FakeClient, settings: Settings) -> None:
    config = replace(CONFIG, gated=replace(CONFIG.gated, attends="all_previous"))
    transport = httpx.ASGITransport(application(client, settings, config))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        response = await http.post(path, json={**REQUESTS[path], "shots_attend": "alone"})
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "shots_attend"


async def test_orders_of_a_row_are_averaged(client: FakeClient, settings: Settings) -> None:
    """A model that sees shots in a row answers differently in another order."""
    config = replace(CONFIG, language_model=replace(CONFIG.language_model, alone_positions="in_a_row"))
    fields = {**REQUESTS["/v1/classify"], "permutations": 2, "shots_attend": "alone"}
    transport = httpx.ASGITransport(application(client, settings, config))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        response = await http.post("/v1/classify", json=fields)
    assert response.status_code == 200, response.text
    first, second = (spans_of(request.prompt) for request in client.scores)
    assert first[:2] == second[1::-1]


async def test_an_average_over_orders_that_are_equal_is_one_prompt(http: httpx.AsyncClient, client: FakeClient) -> None:
    """If positions restart, the order of the shots changes nothing, and the answer says that one order was computed."""
    fields = {**REQUESTS["/v1/classify"], "permutations": 2}
    response = await http.post("/v1/classify", json={**fields, "shots_attend": "alone"})
    assert response.status_code == 200, response.text
    assert len(client.scores) == 1
    body = response.json()
    assert (body["fewshot"]["permutations"], body["usage"]["fewshot_details"]["prompts"]) == (1, 1)
    calibrated = await http.post("/v1/classify", json={**fields, "shots_attend": "alone", "calibration": "contextual"})
    assert calibrated.json()["usage"]["fewshot_details"]["prompts"] == 2
    in_context = await http.post("/v1/classify", json=fields)
    assert in_context.json()["fewshot"]["permutations"] == 2


async def test_decisions_compute_one_prompt_for_orders_that_are_equal(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    fields = {**REQUESTS["/v1/decisions"], "permutations": 2}
    for form, num_prompts in (("alone", 1), ("previous", 2)):
        response = await http.post("/v1/decisions", json={**fields, "shots_attend": form})
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["fewshot_details"]["prompts"] == num_prompts
    assert len(client.scores) == 3


async def test_stored_examples_attend_alone_in_any_order(
    http: httpx.AsyncClient, client: FakeClient, colours: SupportSetInfo
) -> None:
    for order in ("stored", "shuffled"):
        examples = {"support_set": "colours", "k": 4, "order": order}
        response = await post(http, examples=examples, shots_attend="alone")
        assert response.status_code == 200, response.text
    first, second = (spans_of(request.prompt) for request in client.requests)
    assert first != second
    assert sorted(first) == sorted(second)


def spans_of(prompt: EncodedPrompt) -> list[tuple[bytes, list[int]]]:
    starts = [*prompt.span_starts[1:], len(prompt.token_ids)]
    return [(media, prompt.token_ids[a:b]) for media, (a, b) in zip(prompt.media, pairwise(starts), strict=True)]
