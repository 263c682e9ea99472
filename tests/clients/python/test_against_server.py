"""Tests of the client with a real server on a socket: its application, its worker, its decode pool and a tiny model."""

from __future__ import annotations

import asyncio
import base64
import io
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from flamboyance_client import (
    AsyncClient,
    BadRequest,
    Client,
    Completion,
    NotAuthorised,
    NotFound,
    Prompt,
    Retries,
    image,
    shot,
)
from tests.clients.serving import CONFIG, KEY, wait_until


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, api_key=KEY, retries=Retries(limit=0)) as client:
        yield client


def png(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (9, 7), colour).save(stream, "PNG")
    return stream.getvalue()


PROMPT: Prompt = [*shot(png("red"), "red"), image(png("blue")), "a"]


def complete_async(url: str, prompt: Prompt, **options: Any) -> tuple[Completion, list[Completion]]:
    async def run() -> tuple[Completion, list[Completion]]:
        async with AsyncClient(url, api_key=KEY) as client:
            whole = await client.complete(prompt, **options)
            async with client.stream(prompt, **options) as events:
                return whole, [event async for event in events]

    return asyncio.run(run())


def test_complete_stream_and_the_async_client_give_the_same_answer(url: str, client: Client) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    whole = client.complete(PROMPT, **options)
    with client.stream(PROMPT, **options) as stream:
        events = list(stream)
    async_completion, async_events = complete_async(url, PROMPT, **options)

    (choice,) = whole.choices
    assert choice.token_ids is not None
    assert len(choice.token_ids) == 8
    assert choice.finish_reason == "length"
    assert choice == async_completion.choices[0]
    for streamed in (events, async_events):
        assert "".join(event.text for event in streamed) == whole.text
        assert sum((c.token_ids or () for e in streamed for c in e.choices), ()) == choice.token_ids
        assert streamed[-1].usage is not None
        assert streamed[-1].usage.completion_tokens == 8


def test_the_choices_of_a_stream_are_separated_by_index(client: Client) -> None:
    options: dict[str, Any] = {"n": 3, "max_tokens": 6, "seed": 1, "ignore_eos": True}
    whole = client.complete(PROMPT, **options)
    with client.stream(PROMPT, **options) as events:
        pieces = [choice for event in events for choice in event.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    for choice in whole.choices:
        assert "".join(piece.text for piece in pieces if piece.index == choice.index) == choice.text
    assert len({choice.text for choice in whole.choices}) == 3


def test_an_answer_has_the_requested_form(client: Client) -> None:
    reply = client.complete(PROMPT, max_tokens=8, structured_outputs={"choice": ["red", "blue"]})
    assert reply.text in {"red", "blue"}
    assert reply.finish_reason == "stop"


def test_another_image_gives_another_answer(client: Client) -> None:
    scores = []
    for colour in ("blue", "green"):
        reply = client.complete([image(png(colour)), "a"], max_tokens=0, echo=True, logprobs=0)
        assert reply.choices[0].logprobs is not None
        scores.append(reply.choices[0].logprobs.token_logprobs)
    assert scores[0][0] is None
    assert scores[0] != scores[1]


def test_usage_counts_media_and_cached_media(client: Client) -> None:
    client.complete(PROMPT, max_tokens=1)
    usage = client.complete(PROMPT, max_tokens=1).usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + 1
    assert usage.fewshot_details["media"] == 2
    assert usage.fewshot_details["media_encoded"] == 0


def test_leaving_a_stream_aborts_the_generation(url: str, client: Client, caplog: pytest.LogCaptureFixture) -> None:
    def num_aborted() -> float:
        (line,) = re.findall(
            r'^flamboyance:request_success_total{finished_reason="abort".*', metrics(url), re.MULTILINE
        )
        return float(line.split()[-1])

    before = num_aborted()
    with client.stream("a", max_tokens=500, temperature=0, ignore_eos=True) as events:
        next(iter(events))
    wait_until(lambda: num_aborted() == before + 1)
    client.complete("a", max_tokens=1)  # the server has logged any error of the abort by now
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def metrics(url: str) -> str:
    return httpx.get(f"{url}/metrics").text


def test_models_and_health(client: Client) -> None:
    (model,) = client.models()
    assert (model.id, model.raw["max_model_len"]) == (CONFIG.name, 512)
    health = client.health()
    assert health.ready
    assert health.raw["engine"]["device"] == "cpu"


def test_errors_name_the_field(url: str, client: Client) -> None:
    with pytest.raises(BadRequest) as caught:
        client.complete(["a", image("http://example.org/a.png")])
    assert (caught.value.status, caught.value.param) == (422, "prompt[1].image_url.url")
    with pytest.raises(BadRequest) as caught:
        client.complete("a", top_p=2)
    assert (caught.value.status, caught.value.param) == (400, "top_p")
    with pytest.raises(NotFound) as missing:
        client.complete("a", model="other")
    assert missing.value.code == "model_not_found"
    with Client(url) as unauthorised, pytest.raises(NotAuthorised):
        unauthorised.models()


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
def test_invalid_image_bytes_raise(client: Client, streamed: bool) -> None:
    broken = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\nnot at all").decode()
    send = client.stream([image(broken), "a"]).__enter__ if streamed else lambda: client.complete([image(broken), "a"])
    with pytest.raises(BadRequest) as caught:
        send()
    assert (caught.value.code, caught.value.param) == ("invalid_media", "prompt[0].image_url.url")


def test_keys_are_made_listed_and_revoked(client: Client, url: str) -> None:
    made = client.keys.create("team", role="manage", tenant="acme", limits={"requests": 5})
    assert (made.name, made.role, made.tenant, made.limits["requests"]) == ("team", "manage", "acme", 5)
    assert made.secret is not None
    assert made.secret not in repr(made)
    assert [(key.id, key.secret) for key in client.keys.list()] == [(made.id, None)]
    with Client(url, api_key=made.secret, retries=Retries(limit=0)) as team:
        assert len(team.support_sets.list()) == 0
        with pytest.raises(NotAuthorised):
            team.keys.list()
    assert client.keys.revoke(made.id)
    with pytest.raises(TypeError, match="unheard_of"):
        client.keys.create("team", limits={"unheard_of": 5})  # type: ignore[arg-type]


def test_keys_of_an_async_client(url: str) -> None:
    async def manage() -> None:
        async with AsyncClient(url, api_key=KEY, retries=Retries(limit=0)) as client:
            made = await client.keys.create("team")
            assert (made.role, made.tenant) == ("inference", None)
            assert made.id in [key.id for key in await client.keys.list()]
            assert await client.keys.revoke(made.id)

    asyncio.run(manage())
