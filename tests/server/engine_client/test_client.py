"""Streams and replies through a real worker process: order, aborts, pins, and errors."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import numpy as np
import pytest

from model.prompt import EncodedPrompt
from server.engine_client.client import WorkerClient
from server.errors import EngineFailed, InvalidRequest, ShuttingDown
from server.telemetry.metrics import Metrics
from server.wire import Admitted, Finished, Generate, Inspect, Sampling, Token
from tests.server.engine_client.requests import FakeDecoder, image, read_tokens, score, stream, text_prompt
from tests.server.fakes import TOKENIZER, eventually
from tests.server.scripted_engine import FAIL, REFUSE

pytestmark = pytest.mark.anyio


async def test_concurrent_requests_get_their_own_events(engine: WorkerClient) -> None:
    first, second = await asyncio.gather(
        read_tokens(stream(engine, "1"), 6), read_tokens(stream(engine, "2", text="xy"), 6)
    )
    assert first == TOKENIZER.encode_plain("abcabc")
    assert second == TOKENIZER.encode_plain("xyxyxy")


async def test_the_first_event_is_the_admission(engine: WorkerClient) -> None:
    async with aclosing(stream(engine, "1")) as events:
        assert isinstance(await anext(events), Admitted)


async def test_a_closed_stream_aborts_its_request_in_the_worker(engine: WorkerClient, metrics: Metrics) -> None:
    await read_tokens(stream(engine, "1"), 1)
    await eventually(lambda: metrics.engine.values.get("num_preemptions") == 1)  # where it counts aborts


async def test_fail_all_ends_every_stream(engine: WorkerClient) -> None:
    running = asyncio.create_task(read_tokens(stream(engine, "1"), 10**6))
    await asyncio.sleep(0.05)
    engine.fail_all(ShuttingDown("bye"))
    with pytest.raises(ShuttingDown):
        await running


async def test_an_error_of_the_engine_fails_its_request(engine: WorkerClient) -> None:
    with pytest.raises(EngineFailed, match="scripted to fail"):
        await read_tokens(stream(engine, "1", script=FAIL), 1)


async def test_an_error_that_a_field_caused_is_the_clients(engine: WorkerClient) -> None:
    with pytest.raises(InvalidRequest, match="scripted to fail") as refusal:
        await read_tokens(stream(engine, "1", script=REFUSE), 1)
    assert refusal.value.param == "seed"


async def test_ending_one_of_several_answers_keeps_the_stream_open(engine: WorkerClient) -> None:
    request = Generate(request_id="1", prompt=text_prompt("abc"), sampling=Sampling(max_tokens=40, n=2))
    reasons: dict[int, str] = {}
    was_ended = False
    async with aclosing(engine.stream(request, {})) as events:
        async for event in events:
            if isinstance(event, Token) and not was_ended:
                was_ended = True
                engine.end_answer("1", 1)
            if isinstance(event, Token | Finished) and event.finish_reason is not None:
                reasons[event.index] = event.finish_reason
    assert reasons == {1: "abort", 0: "length"}
    engine.end_answer("1", 0)  # its request is closed: nothing is sent


async def test_scores_and_inspections_have_one_reply(engine: WorkerClient, decoder: FakeDecoder) -> None:
    a = image("a")
    prompt = EncodedPrompt(token_ids=[1, 2], media_index=[0, 0], media=[a.digest])
    scored, inspected, token_ids = await asyncio.gather(
        engine.score(score("1", a), {a.digest: a}),
        engine.inspect(Inspect(request_id="2", prompt=prompt, token=1, layers=[3]), {a.digest: a}),
        read_tokens(stream(engine, "3", a), 3),
    )
    assert (scored.logprobs, scored.media_encoded) == ([[-1, -2], [-3]], 1)
    assert inspected.gates[0].layer == 1
    assert token_ids == TOKENIZER.encode_plain("abc")
    assert decoder.decoded == [b"a"]


async def test_vectors_are_in_the_order_of_the_request(
    engine: WorkerClient, decoder: FakeDecoder, metrics: Metrics
) -> None:
    vectors, text_vectors = await asyncio.gather(
        engine.embed([image("b"), image("a"), image("b")]), engine.embed_text([[1, 2, 3], [4]])
    )
    counters = (metrics.media_encoded, metrics.media_cached, metrics.media_queries)
    assert [counter._value.get() for counter in counters] == [2, 1, 3]
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[98.0], [97.0], [98.0]]
    assert text_vectors.tolist() == [[3.0], [1.0]]
    assert sorted(decoder.decoded) == [b"a", b"b"]
    assert (await engine.embed([])).size == 0


async def test_a_cancelled_score_is_aborted(engine: WorkerClient, decoder: FakeDecoder, metrics: Metrics) -> None:
    decoder.opened.clear()
    a = image("a")
    waiting = asyncio.create_task(engine.score(score("1", a), {a.digest: a}))
    await eventually(lambda: decoder.decoded == [b"a"])
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await eventually(lambda: metrics.engine.values.get("num_preemptions") == 1)


async def test_pins_reach_the_worker(engine: WorkerClient, metrics: Metrics) -> None:
    engine.pin([image("a").digest, image("b").digest], True)
    await eventually(lambda: metrics.engine.values.get("media_slots_pinned") == 2)
    engine.pin([image("a").digest], False)
    await eventually(lambda: metrics.engine.values.get("media_slots_pinned") == 1)


async def test_salted_clients_have_media_of_their_own(engine: WorkerClient, decoder: FakeDecoder) -> None:
    decoder.opened.clear()
    clients = [engine, engine.salted("request", "x"), engine.salted("request", "y"), engine.salted("request", "x")]
    requests = [
        asyncio.create_task(each.score(score(str(number), image("a")), {image("a").digest: image("a")}))
        for number, each in enumerate(clients)
    ]
    await eventually(lambda: len(decoder.decoded) == 3)  # requests with the same salt wait for the same pixels
    decoder.opened.set()
    assert [scored.logprobs for scored in await asyncio.gather(*requests)] == [[[-1, -2], [-3]]] * 4
    assert decoder.decoded == [b"a"] * 3
    assert len({each.salt for each in clients}) == 3
    assert (
        engine.salted("request", "x").salted("request", "y").salt
        != engine.salted("request", "y").salted("request", "x").salt
    )
