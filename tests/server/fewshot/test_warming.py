"""Warming encodes and embeds a support set, so that a request embeds only its own query."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Mapping
from itertools import pairwise
from typing import Any, NoReturn

import httpx
import pytest
from fastapi import FastAPI

from model.likeness import Vectors
from server.api.routes import support_sets as support_sets_routes
from server.errors import DatabaseUnavailable, EngineFailed, InvalidRequest, Overloaded
from server.fewshot import prompting, retrieval, warming
from server.fewshot.retrieval import EmbeddingStore
from server.fewshot.warming import Warming, WarmTarget, Warmth
from server.prompt import PreparedPrompt
from server.store.records import NewExample, SupportSetInfo
from server.store.support_sets import SupportSets
from server.wire import Event
from tests.server.api.test_responses import Reader
from tests.server.colours import (
    COLOURS,
    IMAGES,
    QUERY,
    app,
    colours,
    complete,
    example,
    refusal,
    settings,
    shot,
    shot_ids,
    support_sets,
    token_ids,
    url,
)
from tests.server.fakes import TOKENIZER, FakeClient, eventually

__all__ = ["app", "colours", "settings", "support_sets"]  # fixtures

pytestmark = pytest.mark.anyio

QUESTION = {"image": url(QUERY), "text": "pink?"}


async def warm(http: httpx.AsyncClient, name: str = "colours", **fields: Any) -> dict[str, Any]:
    response = await http.post(f"/v1/support_sets/{name}/warm", json={"wait": True, **fields})
    assert response.status_code == 200, response.text
    card: dict[str, Any] = response.json()
    return card


def texts(client: FakeClient) -> list[str]:
    return [TOKENIZER.decode(ids) for ids in client.embedded_texts]


async def test_a_request_for_a_warm_set_embeds_only_its_query(
    http: httpx.AsyncClient, client: FakeClient, colours: SupportSetInfo
) -> None:
    card = await warm(http)
    assert (card["status"], card["warm"]["media_embedded"], card["warm"]["texts_embedded"]) == ("ready", 6, 0)
    assert [media.digest for media in client.embedded] == [media.digest for media in IMAGES]
    await shot_ids(http, strategy="rices_image")
    assert [media.digest for media in client.embedded[6:]] == [QUERY.digest]
    assert client.embedded_texts == []


async def test_a_request_does_not_wait_again_for_a_database_that_stores_no_vectors(
    http: httpx.AsyncClient, client: FakeClient, colours: SupportSetInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_calls = 0

    async def put(self: EmbeddingStore, vectors: Mapping[str, Vectors], model: str) -> None:
        nonlocal num_calls
        num_calls += 1
        raise DatabaseUnavailable("the database does not respond")

    monkeypatch.setattr(EmbeddingStore, "put", put)
    monkeypatch.setattr(retrieval, "BATCH", 2)
    assert len(await shot_ids(http, strategy="rices_text", query=QUESTION)) == 4
    assert len(texts(client)) == 7
    assert num_calls == 1


@pytest.mark.parametrize("strategy", ["rices_text", "mixed"])
async def test_texts_are_embedded_for_a_strategy_that_compares_them(
    http: httpx.AsyncClient, client: FakeClient, colours: SupportSetInfo, strategy: str
) -> None:
    card = await warm(http, strategy=strategy)
    assert (card["warm"]["media_embedded"], card["warm"]["texts_embedded"]) == (6, 6)
    assert texts(client) == [f"a {colour} one" for colour in COLOURS]
    await shot_ids(http, QUESTION, strategy=strategy)
    assert texts(client)[6:] == ["pink?"]
    assert {media.digest for media in client.embedded[6:]} <= {QUERY.digest}


async def test_warming_a_set_again_embeds_nothing(
    http: httpx.AsyncClient, client: FakeClient, colours: SupportSetInfo
) -> None:
    await shot_ids(http, QUESTION, strategy="mixed")
    num_media, num_texts = len(client.embedded), len(client.embedded_texts)
    for info in ({}, {"pid": "of another worker"}):
        client.info = info
        card = await warm(http, strategy="mixed")
        assert (card["warm"]["media_embedded"], card["warm"]["texts_embedded"]) == (6, 6)
    assert (len(client.embedded), len(client.embedded_texts)) == (num_media, num_texts)


async def test_an_example_without_media_or_text_is_embedded_by_the_other(
    http: httpx.AsyncClient, client: FakeClient, support_sets: SupportSets
) -> None:
    image_only = NewExample(id="i", media=(IMAGES[1],))
    text_only = NewExample(id="t", media=(), text="no", question="who?")
    await support_sets.create("partial", [example(0), image_only, text_only])
    card = await warm(http, "partial", strategy="mixed")
    assert (card["status"], card["warm"]["media_embedded"], card["warm"]["texts_embedded"]) == ("ready", 2, 2)
    assert texts(client) == [f"a {COLOURS[0]} one", "who?"]


async def test_a_failed_embedding_is_reported_and_other_strategies_are_refused(
    http: httpx.AsyncClient, client: FakeClient, colours: SupportSetInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(media: Any) -> Any:
        raise EngineFailed("no vectors today")

    with monkeypatch.context() as patched:
        patched.setattr(client, "embed", fail)
        card = await warm(http)
    assert (card["status"], card["warm"]["error"]) == ("failed", "no vectors today")
    assert (await warm(http))["status"] == "ready"
    response = await http.post("/v1/support_sets/colours/warm", json={"strategy": "random"})
    assert refusal(response)[::2] == (422, "strategy")


# concurrent warming


@pytest.fixture
def opened(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Return an event that holds all streams of the client until it is set."""
    opened, stream = asyncio.Event(), client.stream

    async def stream_late(*arguments: Any) -> AsyncGenerator[Event, None]:
        await opened.wait()
        async for event in stream(*arguments):
            yield event

    monkeypatch.setattr(client, "stream", stream_late)
    return opened


async def test_media_are_counted_once_whether_shots_are_computed_or_not(
    http: httpx.AsyncClient, colours: SupportSetInfo
) -> None:
    for fields in ({}, {"template": "caption"}):
        card = (await warm(http, **fields))["warm"]
        assert card["media_encoded"] + card["media_cached"] == card["num_media"] == 6


async def test_without_wait_warming_continues_after_the_response(
    http: httpx.AsyncClient, app: FastAPI, colours: SupportSetInfo, opened: asyncio.Event
) -> None:
    assert (await warm(http, wait=False))["status"] == "warming"
    opened.set()
    await eventually(lambda: app.state.services.warming.warmth(colours.id, 1).status == "ready")


async def test_the_warming_of_a_set_that_is_deleted_ends(
    http: httpx.AsyncClient,
    client: FakeClient,
    app: FastAPI,
    colours: SupportSetInfo,
    opened: asyncio.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(warming, "MAX_CONCURRENT", 2)
    for fields in ({}, {"template": "caption", "shots_attend": "alone"}):
        assert (await warm(http, wait=False, **fields))["status"] == "warming"
    await http.delete("/v1/support_sets/colours")
    opened.set()
    await eventually(lambda: not app.state.services.warming._tasks)
    assert len(client.requests) <= 2
    assert not app.state.services.warming._entries


async def test_a_larger_target_is_warmed_after_the_running_one(
    http: httpx.AsyncClient, client: FakeClient, app: FastAPI, colours: SupportSetInfo, opened: asyncio.Event
) -> None:
    for fields in ({}, {"strategy": "mixed"}, {"strategy": "mixed", "template": "caption"}, {"template": "caption"}):
        assert (await warm(http, wait=False, **fields))["status"] == "warming"
    opened.set()
    card = await warm(http)
    assert (card["status"], card["warm"]["texts_embedded"]) == ("ready", 6)
    assert card["warm"]["prompt_tokens"] > 0
    assert len(texts(client)) == 6
    await eventually(lambda: not app.state.services.warming._tasks)
    assert len(client.requests) == 3 * 6 + 1


async def test_every_example_is_computed_as_a_shot_that_attends_alone(
    http: httpx.AsyncClient, client: FakeClient, colours: SupportSetInfo
) -> None:
    client.info = {"block_size": 4, "block_bytes": 1000}
    card = await warm(http, template="caption", shots_attend="alone")
    prompts = [request.prompt for request in client.requests if request.prompt.shots_attend == "alone"]
    spans = [prompt.span_starts for prompt in prompts]
    assert [prompt.media for prompt in prompts] == [[image.digest] * 2 for image in IMAGES]
    shots = [prompt.token_ids[starts[1] : starts[2]] for prompt, starts in zip(prompts, spans, strict=True)]
    expected = [token_ids(*shot(IMAGES[i], f"a {COLOURS[i]} one")) for i in range(6)]
    assert shots == expected
    # the query is a single token
    assert [len(prompt.token_ids) - starts[2] for prompt, starts in zip(prompts, spans, strict=True)] == [1] * 6
    counts = {name: card["warm"][name] for name in ("shots", "prompt_tokens", "shot_bytes")}
    num_blocks = sum(-(-len(ids) // 4) for ids in expected)
    assert counts == {"shots": 6, "prompt_tokens": sum(map(len, expected)), "shot_bytes": 1000 * num_blocks}
    again = await warm(http, template="caption", shots_attend="alone", k=2)
    assert again["warm"]["shots"] == 2


async def test_the_shots_of_a_warm_set_are_those_of_a_request(
    http: httpx.AsyncClient, client: FakeClient, colours: SupportSetInfo
) -> None:
    await warm(http, template="caption", shots_attend="alone")
    warmed = {tuple(r.prompt.token_ids[:-1]) for r in client.requests if r.prompt.shots_attend == "alone"}
    await complete(http, examples={"support_set": "colours", "k": 3, "strategy": "rices_image"}, shots_attend="alone")
    prompt = client.requests[-1].prompt
    starts = prompt.span_starts
    prefix = prompt.token_ids[: starts[1]]
    shots = [prompt.token_ids[first:end] for first, end in pairwise(starts[1:])]
    assert len(shots) == 3
    assert all((*prefix, *ids) in warmed for ids in shots)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"shots_attend": "alone"}, "shots_attend"),
        ({"shots_attend": "alone", "template": "caption", "k": 7}, "k"),
        ({"shots_attend": "alone", "template": {"shot": "Look: {media}{answer}"}}, "shots_attend"),
        ({"shots_attend": "alone", "template": {"shot": "{answer}"}}, "shots_attend"),
        ({"shots_attend": "next", "template": "caption"}, "shots_attend"),
    ],
)
async def test_shots_that_cannot_be_computed_alone_are_refused(
    http: httpx.AsyncClient, colours: SupportSetInfo, fields: dict[str, Any], param: str
) -> None:
    response = await http.post("/v1/support_sets/colours/warm", json=fields)
    assert response.status_code in (400, 422), response.text
    assert response.json()["error"]["param"] == param


async def test_no_shot_is_written_after_those_that_may_be_in_memory_together(
    http: httpx.AsyncClient, colours: SupportSetInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten thousand long ones would take the memory of the server."""
    written = list[PreparedPrompt]()

    def write(*arguments: Any) -> PreparedPrompt:
        written.append(write_prompt(*arguments))
        return written[-1]

    write_prompt = prompting.write
    monkeypatch.setattr(prompting, "write", write)
    monkeypatch.setattr(prompting, "MAX_TOKENS_ALONE", 40)
    fields = {"template": "caption", "shots_attend": "alone"}
    response = await http.post("/v1/support_sets/colours/warm", json=fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "k"
    assert response.json()["error"]["message"].endswith("tokens in all, the limit is 40")
    num_within = len(written) - 1
    assert 0 < num_within < 5
    card = await warm(http, **fields, k=num_within)
    assert card["warm"]["shots"] == num_within


async def test_unfinished_requests_to_warm_have_a_limit(
    http: httpx.AsyncClient,
    app: FastAPI,
    colours: SupportSetInfo,
    opened: asyncio.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each would hold its prompts until all before it have ended, so a refusal comes before they are built."""
    support_sets, tasks = app.state.services.support_sets, app.state.services.warming
    monkeypatch.setattr(tasks.slots, "total", 4)
    requests: list[dict[str, Any]] = [
        {"template": {"shot": f"{{media}}{number} {{answer}}"}, "wait": False} for number in range(4)
    ]
    for fields in requests[:3]:
        assert (await warm(http, **fields))["status"] == "warming"
    with monkeypatch.context() as patched:
        patched.setattr(SupportSets, "get_version", None)
        response = await http.post("/v1/support_sets/colours/warm", json=requests[3])
        assert refusal(response) == (429, "client_over_share", None)
    support_set = await support_sets.get_version("colours")
    await tasks.warm(support_set, WarmTarget(with_texts=True), requester="other")
    with pytest.raises(Overloaded):
        tasks.slots.check("third")
    # what is being warmed needs no slot, and neither does the maintenance of pinned sets
    assert (await warm(http, wait=False))["status"] == "warming"
    maintained = asyncio.create_task(tasks.warm_again(support_set))
    opened.set()
    assert (await maintained).status == "ready"
    await eventually(lambda: tasks.slots.used == 0)
    assert (await warm(http, **{**requests[3], "wait": True}))["status"] == "ready"


async def test_a_request_to_warm_holds_its_slot_while_its_prompts_are_built(
    http: httpx.AsyncClient, app: FastAPI, colours: SupportSetInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, built = app.state.services.warming.slots, asyncio.Event()
    monkeypatch.setattr(slots, "total", 1)

    async def assemble(*arguments: Any) -> NoReturn:
        await built.wait()
        raise InvalidRequest("a template that fails late", param="template")

    monkeypatch.setattr(support_sets_routes, "assemble_prefix", assemble)
    request = {"template": "caption"}
    first = asyncio.create_task(http.post("/v1/support_sets/colours/warm", json=request))
    await eventually(lambda: slots.used == 1)
    assert refusal(await http.post("/v1/support_sets/colours/warm", json=request)) == (503, "overloaded", None)
    built.set()
    assert refusal(await first) == (400, "invalid_value", "template")
    assert slots.used == 0


async def test_a_request_to_warm_ends_when_its_client_leaves(
    http: httpx.AsyncClient, app: FastAPI, colours: SupportSetInfo, opened: asyncio.Event
) -> None:
    """The warming continues: other requests may wait for it."""
    admission, tasks = app.state.services.admission, app.state.services.warming
    waiting = Reader(app, "/v1/support_sets/colours/warm", {"wait": True})
    await eventually(lambda: admission.num_running == 1)
    assert admission.num_waiting == 0
    await waiting.disconnect()
    await eventually(lambda: admission.num_running == 0)
    assert tasks.slots.used == 1
    opened.set()
    await eventually(lambda: tasks.slots.used == 0)


@pytest.mark.parametrize("k", [1025, 10**6])
async def test_a_prompt_has_at_most_as_many_shots_as_a_request(
    http: httpx.AsyncClient, colours: SupportSetInfo, k: int
) -> None:
    response = await http.post("/v1/support_sets/colours/warm", json={"template": "caption", "k": k})
    assert refusal(response) == (400, "invalid_value", "k")


async def test_prompts_to_warm_are_encoded_outside_the_event_loop(
    http: httpx.AsyncClient, colours: SupportSetInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_in_loop: set[bool] = set()

    def write(*arguments: Any) -> PreparedPrompt:
        is_in_loop.add(threading.current_thread() is threading.main_thread())
        return prompting_write(*arguments)

    prompting_write = prompting.write
    monkeypatch.setattr(prompting, "write", write)
    await warm(http, template="caption", k=2)
    assert is_in_loop == {False}


async def test_statuses_are_counted_without_looking_at_each_set(
    app: FastAPI, http: httpx.AsyncClient, colours: SupportSetInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a hundred thousand sets, this would keep the event loop from other requests after each change of a set."""
    await warm(http, wait=True)
    warmth, set_ids = app.state.services.warming.warmth, list[str]()

    def warmth_of(self: Warming, set_id: str, version: int) -> Warmth:
        set_ids.append(set_id)
        return warmth(set_id, version)

    monkeypatch.setattr(Warming, "warmth", warmth_of)
    cold = {(f"ss_{number}", 1) for number in range(1000)}
    numbers = app.state.services.warming.num_by_status(frozenset(cold | {(colours.id, 1)}))
    assert numbers == {"pending": 1000, "warming": 0, "ready": 1, "failed": 0}
    assert set_ids == [colours.id]
