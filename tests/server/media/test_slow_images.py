"""An image that takes long to decode delays no image of another client."""

from __future__ import annotations

import asyncio
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from server.media.pool import DecodePool
from server.media.source import EncodedMedia
from server.media.turns import RECENT_SECONDS, Job, Requester
from server.settings import Settings
from tests.server.conftest import png
from tests.server.fakes import eventually
from tests.server.media.pools import VISION, media, pids, slowly_started

pytestmark = pytest.mark.anyio


@pytest.fixture
def settings() -> Settings:
    return Settings(decode_processes=2, max_media_pixels=10_000)


def held(is_over: threading.Event) -> EncodedMedia:
    """Return an image whose bytes cannot be read before the event."""

    def read() -> bytes:
        is_over.wait(60)
        return png()

    return replace(media(b""), source=read)


async def test_images_that_take_long_delay_no_image_of_another_client(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JPEG of 300 kB may have so many scans that it takes 20 seconds."""
    monkeypatch.setattr("server.media.pool.SHORT_SECONDS", 0.1)
    pool, is_over = DecodePool(VISION, settings), threading.Event()
    slow = [asyncio.create_task(pool.decode(held(is_over), Job(Requester(client="slow")))) for _ in range(3)]
    await asyncio.sleep(0.3)
    await asyncio.wait_for(pool.decode(media(png()), Job(Requester(client="other"))), 30)
    assert not any(task.done() for task in slow)
    is_over.set()
    assert [frames.shape[0] for frames in await asyncio.gather(*slow)] == [1, 1, 1]
    await pool.stop()


async def test_an_image_is_not_slow_because_its_process_waits_for_a_processor(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, is_over = DecodePool(VISION, settings), threading.Event()
    await asyncio.gather(pool.decode(media(png())), pool.decode(media(png("blue"))))
    assert len(pids(pool)) == 2
    monkeypatch.setattr("server.media.pool.SHORT_SECONDS", 0.1)
    monkeypatch.setattr("server.run_queue.RunQueue.take_wait", lambda _: 1.0)

    clients = {"first": held(is_over), "second": held(is_over), "other": media(png())}
    tasks = [
        asyncio.create_task(pool.decode(image, Job(Requester(client=client)))) for client, image in clients.items()
    ]
    await asyncio.sleep(0.5)
    assert not any(task.done() for task in tasks), "no process was taken from a slow image"
    is_over.set()
    await asyncio.gather(*tasks)
    await pool.stop()


async def test_a_process_is_no_longer_kept_for_a_client_that_has_not_come_for_seconds(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, is_over, now = DecodePool(VISION, settings), threading.Event(), 0.0
    pool.turns._clock = lambda: now
    await asyncio.gather(pool.decode(media(png())), pool.decode(media(png("blue"))))
    monkeypatch.setattr("server.media.pool.SHORT_SECONDS", 0.1)
    monkeypatch.setattr("server.run_queue.RunQueue.take_wait", lambda _: 1.0)  # nothing turns out slow
    await pool.decode(media(png()), Job(Requester(client="other")))
    many = Requester(client="many")
    first = asyncio.create_task(pool.decode(held(is_over), Job(many)))
    second = asyncio.create_task(pool.decode(media(png()), Job(many)))
    await asyncio.sleep(0.3)
    assert not second.done()
    now += RECENT_SECONDS + 1
    await asyncio.wait_for(second, 30)
    assert not first.done()
    is_over.set()
    await first
    await pool.stop()


async def test_an_image_is_not_slow_because_its_process_starts(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.media.pool.SHORT_SECONDS", 0.5)
    monkeypatch.setattr(sys, "executable", slowly_started(tmp_path))
    pool = DecodePool(VISION, settings)
    clients = [pool.decode(media(png()), Job(Requester(client=str(number)))) for number in range(6)]
    decoding = asyncio.gather(*clients)
    await eventually(lambda: len(pids(pool)) == 2)
    before = pids(pool)
    await decoding
    assert pids(pool) == before
    await pool.stop()
