"""Media on demand: decoded once per media item, only when requested, and failed by name."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from server.engine_client.client import WorkerClient
from server.engine_client.media_supply import MediaSupply, OpenRequest
from server.engine_client.spare import Spare
from server.errors import (
    EngineDied,
    EngineFailed,
    InvalidMedia,
    MediaNotFound,
    Overloaded,
    ServerError,
    StorageUnavailable,
)
from server.limits.turns import client_in_turn
from server.media.decoder import Frames
from server.media.source import EncodedMedia
from server.media.turns import DecodeTurns, Job, Requester
from server.settings import Settings
from server.telemetry.metrics import Metrics
from server.wire import Event, Finished
from tests.server.engine_client.requests import FRAME, FakeDecoder, image, read_tokens, stream
from tests.server.fakes import eventually

pytestmark = pytest.mark.anyio


def deleted(name: str, error: type[ServerError] = MediaNotFound) -> EncodedMedia:
    """Return a stored image whose bytes can no longer be read."""

    def read() -> bytes:
        raise error(f"there is no media {name!r}")

    return replace(image(name), source=read, param="prompt[0].image_id")


async def test_media_are_decoded_on_request_and_once_for_all(engine: WorkerClient, decoder: FakeDecoder) -> None:
    a, b = image("a"), image("b")
    decoder.opened.clear()
    running = [asyncio.create_task(read_tokens(stream(engine, str(i), a, b), 3)) for i in range(4)]
    await eventually(lambda: len(decoder.decoded) == 2)
    decoder.opened.set()
    await asyncio.gather(*running)
    await read_tokens(stream(engine, "later", b, a), 1)
    assert sorted(decoder.decoded) == [b"a", b"b"]


async def test_an_image_of_an_abandoned_request_is_decoded_again(engine: WorkerClient, decoder: FakeDecoder) -> None:
    decoder.opened.clear()
    cancelled = asyncio.create_task(read_tokens(stream(engine, "1", image("a")), 1))
    await eventually(lambda: decoder.decoded == [b"a"])
    cancelled.cancel()
    await eventually(lambda: decoder.cancelled == [b"a"])
    decoder.opened.set()
    await asyncio.wait_for(read_tokens(stream(engine, "2", image("a")), 1), 20)
    assert decoder.decoded == [b"a", b"a"]


async def test_an_image_that_another_request_shows_is_decoded_to_its_end(
    engine: WorkerClient, decoder: FakeDecoder
) -> None:
    decoder.opened.clear()
    tasks = [asyncio.create_task(read_tokens(stream(engine, str(i), image("a")), 1)) for i in range(2)]
    await eventually(lambda: decoder.decoded == [b"a"] and len(engine._open_requests) == 2)
    tasks[0].cancel()
    decoder.opened.set()
    await tasks[1]
    assert (decoder.decoded, decoder.cancelled) == ([b"a"], [])


async def test_an_image_that_another_client_needs_as_well_waits_no_longer(
    engine: WorkerClient, decoder: FakeDecoder
) -> None:
    """The last decode process was kept for that client."""
    await use_two_processes(decoder)
    first = start("one", stream(engine, "1", image("a"), image("b")))
    await eventually(lambda: decoder.decoded == [b"a"] and len(engine._supply._decoding) == 2)
    second = start("other", stream(engine, "2", image("b")))
    await eventually(lambda: decoder.decoded == [b"a", b"b"])
    decoder.opened.set()
    await asyncio.gather(first, second)


async def test_a_client_without_a_running_job_any_more_waits_no_longer(
    engine: WorkerClient, decoder: FakeDecoder
) -> None:
    await use_two_processes(decoder)
    first = start("one", stream(engine, "1", image("a")))
    await eventually(lambda: decoder.decoded == [b"a"])
    second = start("two", stream(engine, "2", image("a")))
    await eventually(lambda: len(engine._open_requests) == 2)
    third = start("one", stream(engine, "3", image("b")))
    await eventually(lambda: len(engine._supply._decoding) == 2)
    assert decoder.decoded == [b"a"]
    first.cancel()
    await eventually(lambda: decoder.decoded == [b"a", b"b"])
    decoder.opened.set()
    await asyncio.gather(second, third)


class Uncancelled(FakeDecoder):
    """A decoder whose processes continue for as long as `opened` is cleared, whatever happens to their requests."""

    async def decode(self, media: EncodedMedia, job: Job | None = None) -> Frames:
        turn = await self.turns.take(job or Job(Requester()))
        self.decoded.append(media.data)
        waiting = asyncio.create_task(self.opened.wait())
        waiting.add_done_callback(lambda _: self.turns.give_back(turn))
        await asyncio.shield(waiting)
        return FRAME


async def test_a_client_that_leaves_has_its_decode_process_until_that_is_idle(metrics: Metrics) -> None:
    """Otherwise it would have all processes, if it left again and again."""
    decoder = Uncancelled()
    async with running(Settings(), decoder, metrics) as engine:
        await use_two_processes(decoder)
        first = start("one", stream(engine, "1", image("a")))
        await eventually(lambda: decoder.decoded == [b"a"])
        second = start("one", stream(engine, "2", image("b")))
        await eventually(lambda: len(engine._supply._decoding) == 2)
        first.cancel()
        await eventually(lambda: len(engine._open_requests) == 1)
        third = start("other", stream(engine, "3", image("c")))
        await eventually(lambda: len(decoder.decoded) == 2)
        assert decoder.decoded == [b"a", b"c"]
        decoder.opened.set()
        await asyncio.gather(second, third)


async def use_two_processes(decoder: FakeDecoder) -> None:
    """Let the decoder wait with two processes, of which the last one is kept for the client "other"."""
    decoder.turns = DecodeTurns([0, 1])
    decoder.turns.give_back(await decoder.turns.take(Job(Requester(client="other"))))
    decoder.opened.clear()


def start(client: str, events: AsyncGenerator[Event, None]) -> asyncio.Task[list[int]]:
    """Read the first token of a stream as this client."""
    client_in_turn.set(client)
    return asyncio.create_task(read_tokens(events, 1))


def mib(num_frames: float) -> float:
    return num_frames * len(FRAME.data) / 2**20


@asynccontextmanager
async def running(settings: Settings, decoder: FakeDecoder, metrics: Metrics) -> AsyncIterator[WorkerClient]:
    client = WorkerClient(
        settings, decoder, metrics, Spare("tests.server.scripted_engine:build", settings.max_restart_delay)
    )
    await client.start()
    await asyncio.wait_for(client.loaded(), 20)
    yield client
    await client.stop()


async def test_the_frames_of_a_request_have_a_limit(decoder: FakeDecoder, metrics: Metrics) -> None:
    async with running(Settings(max_request_frames_mb=mib(2.5)), decoder, metrics) as engine:
        decoder.opened.clear()
        large = asyncio.create_task(read_tokens(stream(engine, "1", *map(image, "abc")), 1))
        small = asyncio.create_task(read_tokens(stream(engine, "2", image("d")), 1))
        await eventually(lambda: len(decoder.decoded) == 4)
        decoder.opened.set()
        await small
        with pytest.raises(InvalidMedia, match="have 36 bytes up to this media item, the limit is 30") as caught:
            await large
        assert caught.value.param == "prompt[c]"


async def test_the_frames_of_all_open_requests_have_a_limit(decoder: FakeDecoder, metrics: Metrics) -> None:
    """Above it, the longest open request is completed first."""
    async with running(Settings(max_open_frames_mb=mib(1.5)), decoder, metrics) as engine:
        decoder.turns = DecodeTurns([0])
        decoder.opened.clear()
        first = asyncio.create_task(read_tokens(stream(engine, "1", *map(image, "abc")), 1))
        await eventually(lambda: decoder.decoded == [b"a"])
        second = asyncio.create_task(read_tokens(stream(engine, "2", *map(image, "de")), 1))
        await eventually(lambda: len(engine._supply._decoding) == 5)
        decoder.opened.set()
        await asyncio.gather(first, second)
    assert decoder.decoded == [b"a", b"d", b"b", b"c", b"e"]


def is_paused(request: OpenRequest) -> bool:
    return request.requester.is_paused


async def test_frames_count_while_any_open_request_needs_them(decoder: FakeDecoder, metrics: Metrics) -> None:
    requests = {name: OpenRequest({image("a").digest: image("a")}) for name in ("first", "second", "third")}
    requests["other"] = OpenRequest({image("b").digest: image("b")})
    opened = dict[str, OpenRequest]()
    supply = MediaSupply(decoder, metrics, Settings(max_open_frames_mb=mib(0.5)), opened)
    for name, request in requests.items():
        opened[name] = request
        supply.begin(request)
        if name == "first":
            supply._count(FRAME, image("a"), Job(request.requester))
    supply.end(opened.pop("first"))
    assert is_paused(requests["other"])
    supply.release(requests["second"])
    assert not is_paused(requests["other"])
    supply.end(opened.pop("second"))
    assert supply._num_waiting == {image("a").digest: 1, image("b").digest: 1}


async def test_a_request_without_media_does_not_pause_the_others(decoder: FakeDecoder, metrics: Metrics) -> None:
    """It has no frames to release, and may take long: those that have some would wait for it."""
    async with running(Settings(max_open_frames_mb=mib(1.5)), decoder, metrics) as engine:
        decoder.turns = DecodeTurns([0])
        decoder.opened.clear()
        without = engine._open_requests["0"] = OpenRequest({})
        first = asyncio.create_task(read_tokens(stream(engine, "1", *map(image, "abcd")), 1))
        await eventually(lambda: decoder.decoded == [b"a"])
        decoder.opened.set()
        await asyncio.wait_for(first, 20)
        assert not without.is_encoded
        del engine._open_requests["0"]


async def test_an_image_that_cannot_be_decoded_fails_only_the_requests_that_show_it(
    engine: WorkerClient, decoder: FakeDecoder, metrics: Metrics
) -> None:
    decoder.error = InvalidMedia("not an image", param="prompt[of another request]")
    bad = asyncio.create_task(read_tokens(stream(engine, "1", image("a")), 1))
    good = asyncio.create_task(read_tokens(stream(engine, "2"), 50))
    with pytest.raises(InvalidMedia, match="not an image") as caught:
        await bad
    assert caught.value.param == "prompt[a]"
    await good
    assert "flamboyance:media_decode_failures_total" in metrics.expose().decode()


async def test_a_request_that_fails_for_another_reason_does_not_name_an_image() -> None:
    request = OpenRequest({}, media_errors={"not an image": InvalidMedia("not an image", param="prompt[0]")})
    for message, kind in (("not an image", InvalidMedia), ("the model's output is not finite", EngineFailed)):
        request.events.put_nowait(Finished(request_id="1", finish_reason="error", error=message))
        with pytest.raises(kind, match=message):
            await request.next()


async def test_a_request_that_fails_for_a_while_may_be_repeated() -> None:
    request = OpenRequest({})
    request.events.put_nowait(Finished(request_id="1", finish_reason="error", error="not now", is_temporary=True))
    with pytest.raises(Overloaded, match="not now") as caught:
        await request.next()
    assert caught.value.is_retryable


async def test_an_image_that_cannot_be_decoded_fails_its_embedding(engine: WorkerClient, decoder: FakeDecoder) -> None:
    decoder.error = InvalidMedia("broken")
    with pytest.raises(InvalidMedia, match="broken") as caught:
        await engine.embed([image("a")])
    assert caught.value.param == "prompt[a]"
    assert (await engine.embed_text([[1]])).tolist() == [[1.0]]


async def test_an_unexpected_error_in_decoding_fails_the_request(engine: WorkerClient, decoder: FakeDecoder) -> None:
    decoder.error = KeyError("bug")
    with pytest.raises(InvalidMedia, match="decoding failed"):
        await read_tokens(stream(engine, "1", image("a")), 1)


async def test_an_image_deleted_meanwhile_is_not_found(engine: WorkerClient, decoder: FakeDecoder) -> None:
    decoder.error = MediaNotFound("there is no media 'img_0'", param="prompt[of another request]")
    with pytest.raises(MediaNotFound, match="no media 'img_0'") as caught:
        await read_tokens(stream(engine, "1", image("a")), 1)
    assert caught.value.param == "prompt[a]"


@pytest.mark.parametrize("error", [MediaNotFound, StorageUnavailable])
async def test_an_image_that_cannot_be_read_is_decoded_from_another_request(
    error: type[ServerError], engine: WorkerClient, decoder: FakeDecoder
) -> None:
    media = [deleted("a", error), image("a"), deleted("a", error)]
    await asyncio.gather(*(read_tokens(stream(engine, str(i), item), 1) for i, item in enumerate(media)))
    assert decoder.decoded == [b"a"]


async def test_an_image_that_another_tenant_has_lost_is_decoded_from_its_own_file(
    engine: WorkerClient, decoder: FakeDecoder
) -> None:
    stored = replace(image("a"), source=lambda: b"a")
    media = [deleted("a"), deleted("a"), stored]
    await asyncio.gather(*(read_tokens(stream(engine, str(i), item), 1) for i, item in enumerate(media)))
    assert decoder.decoded == [b"a"]


async def test_a_deleted_image_is_decoded_from_a_request_that_comes_later(
    engine: WorkerClient, decoder: FakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, reading = decoder.decode, asyncio.Event()

    async def decode_late(media: EncodedMedia, job: Job) -> Frames:
        reading.set()
        await decoder.opened.wait()
        return await decode(media)

    monkeypatch.setattr(decoder, "decode", decode_late)
    decoder.opened.clear()
    first = asyncio.create_task(read_tokens(stream(engine, "1", deleted("a")), 1))
    await reading.wait()
    second = asyncio.create_task(read_tokens(stream(engine, "2", image("a")), 1))
    await eventually(lambda: len(engine._open_requests) == 2)
    decoder.opened.set()
    await asyncio.gather(first, second)
    assert decoder.decoded == [b"a"]


async def test_media_of_a_dead_worker_are_decoded_again_for_the_next(
    engine: WorkerClient, decoder: FakeDecoder
) -> None:
    decoder.opened.clear()
    waiting = asyncio.create_task(read_tokens(stream(engine, "1", image("a")), 1))
    await eventually(lambda: decoder.decoded == [b"a"])
    os.kill(engine.info["pid"], signal.SIGKILL)
    with pytest.raises(EngineDied):
        await waiting
    await eventually(lambda: engine.state == "ready")
    decoder.opened.set()
    await read_tokens(stream(engine, "2", image("a")), 1)
    assert decoder.decoded == [b"a", b"a"]
