"""A real worker process with an engine that tells a story: events, media on demand, death and return."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest

from model.prompt import EncodedPrompt
from server.engine_client.client import EngineClient
from server.errors import EngineDied, EngineFailed, EngineNotReady, InvalidMedia, MediaNotFound, ShuttingDown
from server.media.decoder import Frames
from server.media.source import EncodedMedia
from server.metrics import Metrics
from server.settings import Settings
from server.wire import Admitted, Event, Finished, Generate, Inspect, Sampling, Score, Token
from tests.server.fakes import TOKENIZER, eventually
from tests.server.scripted_engine import FAIL, RAISE, SLEEP

pytestmark = pytest.mark.anyio
FRAME = Frames(shape=(1, 2, 2, 3), data=bytes(12))


class FakeDecoder:
    """Decodes when it is let to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.opened = asyncio.Event()
        self.opened.set()
        self.error: Exception | None = None

    async def decode(self, media: EncodedMedia) -> Frames:
        self.asked.append(media.data)
        await self.opened.wait()
        if self.error is not None:
            raise self.error
        return FRAME

    async def stop(self) -> None:
        pass


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("tiny")


@pytest.fixture
async def decoder() -> FakeDecoder:
    return FakeDecoder()


@pytest.fixture
async def engine(
    decoder: FakeDecoder, metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[EngineClient]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    client = EngineClient(Settings(), decoder, metrics, factory="tests.server.scripted_engine:build")
    await client.start()
    await asyncio.wait_for(client.loaded(), 20)
    yield client
    await client.stop()


def media(name: str) -> EncodedMedia:
    return EncodedMedia(kind="image", data=name.encode(), digest=name.encode().ljust(32), param=f"prompt[{name}]")


def stream(
    engine: EngineClient, name: str, *shown: EncodedMedia, prompt: str = "abc", order: int | None = None
) -> AsyncGenerator[Event, None]:
    ids = TOKENIZER.encode_plain(prompt)
    request = Generate(
        request_id=name,
        prompt=EncodedPrompt(
            token_ids=ids,
            media_index=[-1] * len(ids),
            media=[m.digest for m in shown],
        ),
        sampling=Sampling(max_tokens=10**6, seed=order),
    )
    return engine.stream(request, {m.digest: m for m in shown})


async def tokens(events: AsyncGenerator[Event, None], count: int) -> list[int]:
    """The first `count` tokens; then the request is left."""
    found: list[int] = []
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Token):
                found.append(event.token_id)
            if len(found) == count:
                return found
    raise AssertionError(f"ended after {len(found)} tokens")


async def test_events_of_requests_that_run_together_are_kept_apart(engine: EngineClient) -> None:
    first, second = await asyncio.gather(tokens(stream(engine, "1"), 6), tokens(stream(engine, "2", prompt="xy"), 6))
    assert first == TOKENIZER.encode_plain("abcabc")
    assert second == TOKENIZER.encode_plain("xyxyxy")


async def test_a_request_that_is_left_is_aborted_in_the_worker(engine: EngineClient, metrics: Metrics) -> None:
    await tokens(stream(engine, "1"), 1)
    await eventually(lambda: metrics.engine.values.get("num_preemptions") == 1)  # the told engine counts aborts there


async def test_media_are_decoded_only_when_wanted_and_once_for_all(engine: EngineClient, decoder: FakeDecoder) -> None:
    a, b = media("a"), media("b")
    decoder.opened.clear()
    running = [asyncio.create_task(tokens(stream(engine, str(i), a, b), 3)) for i in range(4)]
    await eventually(lambda: len(decoder.asked) == 2)
    decoder.opened.set()
    await asyncio.gather(*running)
    await tokens(stream(engine, "later", b, a), 1)
    assert sorted(decoder.asked) == [b"a", b"b"]


async def test_a_wish_is_answered_after_its_request_has_gone(engine: EngineClient, decoder: FakeDecoder) -> None:
    decoder.opened.clear()
    left = asyncio.create_task(tokens(stream(engine, "1", media("a")), 1))
    await eventually(lambda: decoder.asked == [b"a"])
    left.cancel()
    decoder.opened.set()
    await tokens(stream(engine, "2", media("a")), 1)


async def test_a_media_that_cannot_be_decoded_fails_the_requests_that_show_it_alone(
    engine: EngineClient, decoder: FakeDecoder, metrics: Metrics
) -> None:
    decoder.error = InvalidMedia("no picture", param="prompt[of somebody else]")
    bad = asyncio.create_task(tokens(stream(engine, "1", media("a")), 1))
    good = asyncio.create_task(tokens(stream(engine, "2"), 50))
    with pytest.raises(InvalidMedia, match="no picture") as caught:
        await bad
    assert caught.value.param == "prompt[a]"
    await good
    assert "flamboyance:media_decode_failures_total" in metrics.expose().decode()


async def test_a_media_that_was_deleted_meanwhile_is_not_found(engine: EngineClient, decoder: FakeDecoder) -> None:
    decoder.error = MediaNotFound("there is no media 'img_0'", param="prompt[of somebody else]")
    with pytest.raises(MediaNotFound, match="no media 'img_0'") as caught:
        await tokens(stream(engine, "1", media("a")), 1)
    assert caught.value.param == "prompt[a]"


def deleted(name: str) -> EncodedMedia:
    def read() -> bytes:
        raise MediaNotFound(f"there is no media {name!r}")

    return EncodedMedia(kind="image", data=read, digest=media(name).digest, param="prompt[0].image_id")


async def test_a_deleted_media_that_another_request_brings_along_is_decoded(
    engine: EngineClient, decoder: FakeDecoder
) -> None:
    shown = [deleted("a"), media("a"), deleted("a")]
    await asyncio.gather(*(tokens(stream(engine, str(i), one), 1) for i, one in enumerate(shown)))
    assert decoder.asked == [b"a"]


async def test_bytes_that_come_while_a_deleted_media_is_looked_for_are_decoded(
    engine: EngineClient, decoder: FakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, reading = decoder.decode, asyncio.Event()

    async def decode_late(one: EncodedMedia) -> Frames:
        reading.set()
        await decoder.opened.wait()
        return await decode(one)

    monkeypatch.setattr(decoder, "decode", decode_late)
    decoder.opened.clear()
    first = asyncio.create_task(tokens(stream(engine, "1", deleted("a")), 1))
    await reading.wait()
    second = asyncio.create_task(tokens(stream(engine, "2", media("a")), 1))
    await eventually(lambda: len(engine._streams) == 2)
    decoder.opened.set()
    await asyncio.gather(first, second)
    assert decoder.asked == [b"a"]


async def test_a_bug_in_decoding_fails_the_request_and_nothing_hangs(
    engine: EngineClient, decoder: FakeDecoder
) -> None:
    decoder.error = KeyError("bug")
    with pytest.raises(InvalidMedia, match="decoding failed"):
        await tokens(stream(engine, "1", media("a")), 1)


async def test_a_killed_worker_fails_what_is_in_it_and_comes_back(engine: EngineClient, metrics: Metrics) -> None:
    pid = engine.info["pid"]
    running = [asyncio.create_task(tokens(stream(engine, str(i)), 10**6)) for i in range(3)]
    await asyncio.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    for result in await asyncio.gather(*running, return_exceptions=True):
        assert isinstance(result, EngineDied)
    assert engine.state == "restarting"
    with pytest.raises(EngineNotReady):
        await tokens(stream(engine, "refused"), 1)
    await eventually(lambda: engine.state == "ready")
    assert engine.info["pid"] != pid
    assert await tokens(stream(engine, "after"), 3) == TOKENIZER.encode_plain("abc")
    assert 'flamboyance:engine_restarts_total{model_name="tiny"} 1.0' in metrics.expose().decode()


async def test_a_step_that_raises_is_a_death_like_another(engine: EngineClient) -> None:
    with pytest.raises(EngineDied):
        await tokens(stream(engine, "1", order=RAISE), 1)
    await eventually(lambda: engine.state == "ready")


async def test_media_in_decoding_at_a_death_are_decoded_again_for_the_next_life(
    engine: EngineClient, decoder: FakeDecoder
) -> None:
    decoder.opened.clear()
    waiting = asyncio.create_task(tokens(stream(engine, "1", media("a")), 1))
    await eventually(lambda: decoder.asked == [b"a"])
    os.kill(engine.info["pid"], signal.SIGKILL)
    with pytest.raises(EngineDied):
        await waiting
    await eventually(lambda: engine.state == "ready")
    decoder.opened.set()
    await tokens(stream(engine, "2", media("a")), 1)
    assert decoder.asked == [b"a", b"a"]


async def test_a_worker_that_hangs_shows_its_age(engine: EngineClient) -> None:
    assert engine.step_age == 0.0
    hanging = asyncio.create_task(tokens(stream(engine, "1", order=SLEEP), 1))
    await eventually(lambda: engine.step_age > 1.0)
    hanging.cancel()
    os.kill(engine.info["pid"], signal.SIGKILL)
    await eventually(lambda: engine.state == "restarting")


async def test_an_idle_worker_has_no_age(engine: EngineClient) -> None:
    await asyncio.sleep(1.2)
    assert engine.step_age == 0.0


async def test_shutting_down_ends_every_stream(engine: EngineClient) -> None:
    running = asyncio.create_task(tokens(stream(engine, "1"), 10**6))
    await asyncio.sleep(0.05)
    engine.fail_all(ShuttingDown("bye"))
    with pytest.raises(ShuttingDown):
        await running


async def test_the_socket_is_this_users_alone(engine: EngineClient, tmp_path: Path) -> None:
    (folder,) = tmp_path.glob("flamboyance-*")
    (socket,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600


async def test_a_worker_that_cannot_start_is_said_and_not_tried_again(decoder: FakeDecoder, metrics: Metrics) -> None:
    client = EngineClient(Settings(), decoder, metrics, factory="tests.server.scripted_engine:build_fails")
    await client.start()
    with pytest.raises(EngineDied, match="could not be started"):
        await asyncio.wait_for(client.loaded(), 20)
    assert client.state == "failed"
    await client.stop()


async def test_an_engines_own_refusal_is_its_error(engine: EngineClient) -> None:
    with pytest.raises(EngineFailed, match="told to fail"):
        await tokens(stream(engine, "1", order=FAIL), 1)


async def test_the_first_event_is_the_admission(engine: EngineClient) -> None:
    async with aclosing(stream(engine, "1")) as events:
        assert isinstance(await anext(events), Admitted)


# requests that are answered whole


def score(name: str, *shown: EncodedMedia) -> Score:
    ids = TOKENIZER.encode_plain("abc")
    digests = [m.digest for m in shown]
    return Score(
        request_id=name,
        prompt=EncodedPrompt(
            token_ids=ids,
            media_index=[-1] * 3,
            media=digests,
        ),
        candidates=[[1, 2], [3]],
        priority=1,
    )


async def test_scores_and_inspections_come_back_whole(engine: EngineClient, decoder: FakeDecoder) -> None:
    a = media("a")
    inspect = Inspect(
        request_id="2",
        prompt=EncodedPrompt(
            token_ids=[1, 2],
            media_index=[0, 0],
            media=[a.digest],
        ),
        token=1,
        layers=[3],
    )
    scored, inspected, generated = await asyncio.gather(
        engine.score(score("1", a), {a.digest: a}),
        engine.inspect(inspect, {a.digest: a}),
        tokens(stream(engine, "3", a), 3),
    )
    assert (scored.logprobs, scored.media_encoded) == ([[-1, -2], [-3]], 1)
    assert inspected.gates[0].layer == 1
    assert generated == TOKENIZER.encode_plain("abc")
    assert decoder.asked == [b"a"]


async def test_vectors_come_back_in_order(engine: EngineClient, decoder: FakeDecoder) -> None:
    found, texts = await asyncio.gather(
        engine.embed([media("b"), media("a"), media("b")]), engine.embed_text([[1, 2, 3], [4]])
    )
    assert found.dtype == np.float32
    assert found.tolist() == [[98.0], [97.0], [98.0]]
    assert texts.tolist() == [[3.0], [1.0]]
    assert sorted(decoder.asked) == [b"a", b"b"]
    assert (await engine.embed([])).size == 0


async def test_a_media_that_cannot_be_decoded_fails_the_embedding_by_name(
    engine: EngineClient, decoder: FakeDecoder
) -> None:
    decoder.error = InvalidMedia("broken")
    with pytest.raises(InvalidMedia, match="broken") as caught:
        await engine.embed([media("a")])
    assert caught.value.param == "prompt[a]"
    assert (await engine.embed_text([[1]])).tolist() == [[1.0]]


async def test_a_score_that_nobody_waits_for_is_aborted(
    engine: EngineClient, decoder: FakeDecoder, metrics: Metrics
) -> None:
    decoder.opened.clear()
    a = media("a")
    waiting = asyncio.create_task(engine.score(score("1", a), {a.digest: a}))
    await eventually(lambda: decoder.asked == [b"a"])
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await eventually(lambda: metrics.engine.values.get("num_preemptions") == 1)


async def test_a_score_dies_with_its_worker(engine: EngineClient, decoder: FakeDecoder) -> None:
    decoder.opened.clear()
    a = media("a")
    waiting = asyncio.create_task(engine.score(score("1", a), {a.digest: a}))
    await eventually(lambda: decoder.asked == [b"a"])
    os.kill(engine.info["pid"], signal.SIGKILL)
    with pytest.raises(EngineDied):
        await waiting
    with pytest.raises(EngineNotReady):
        await engine.embed_text([[1]])
    engine.pin([a.digest], True)  # a hint to nobody


async def test_one_answer_of_several_is_ended_and_the_stream_goes_on(engine: EngineClient) -> None:
    ids = TOKENIZER.encode_plain("abc")
    request = Generate(
        request_id="1",
        prompt=EncodedPrompt(
            token_ids=ids,
            media_index=[-1] * 3,
            media=[],
        ),
        sampling=Sampling(max_tokens=40, n=2),
    )
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
    engine.end_answer("1", 0)  # too late, and for nobody


async def test_pins_reach_the_worker(engine: EngineClient, metrics: Metrics) -> None:
    engine.pin([media("a").digest, media("b").digest], True)
    await eventually(lambda: metrics.engine.values.get("media_slots_pinned") == 2)
    engine.pin([media("a").digest], False)
    await eventually(lambda: metrics.engine.values.get("media_slots_pinned") == 1)


async def test_the_collector_leaves_alone_what_was_there_before_the_first_request(
    engine: EngineClient, metrics: Metrics
) -> None:
    await eventually(lambda: metrics.engine.values.get("num_frozen_objects", 0) > 1000)
