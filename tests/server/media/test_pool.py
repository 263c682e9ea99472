"""The decode pool with real processes: frames as the model family needs them, and the damage that bad media can do."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import signal
import sys
import threading
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

from model import heif
from model.media import MediaLimits, load_image, resize
from server.errors import InvalidMedia, MediaNotFound, StorageUnavailable, TooManyPixels, Unavailable
from server.media.decode_process import DecodeProcess
from server.media.decoder import NICENESS, Decode, Frames, Refused
from server.media.pool import DecodePool
from server.media.source import EncodedMedia
from server.media.turns import Job, Requester
from server.settings import Settings
from tests.server.conftest import png
from tests.server.fakes import eventually
from tests.server.media.pools import VISION, media, pids, slowly_started
from tests.server.media.videos import film

pytestmark = pytest.mark.anyio
# of Linux: a process that is nice already may be unable to become nicer
MAX_NICENESS = 19


@pytest.fixture
def settings() -> Settings:
    return Settings(decode_processes=1, decode_timeout=20, max_media_pixels=10_000)


@pytest.fixture
async def pool(settings: Settings) -> AsyncIterator[DecodePool]:
    pool = DecodePool(VISION, settings)
    yield pool
    await pool.stop()


def noise(size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(file, "PNG")
    return file.getvalue()


async def test_frames_are_resized_for_the_family(pool: DecodePool) -> None:
    data = noise()
    frames = await pool.decode(media(data))
    assert frames.shape == (1, 12, 12, 3)
    assert np.array_equal(
        np.frombuffer(frames.data, np.uint8).reshape(12, 12, 3), resize(load_image(data, MediaLimits()), VISION)
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"GIF", "not one of JPEG, PNG"), (png()[:40], "cannot be decoded"), (png(size=(200, 100)), "20000 pixels")],
)
async def test_a_bad_image_is_refused_and_the_process_continues(pool: DecodePool, data: bytes, reason: str) -> None:
    await pool.decode(media(png()))
    before = pids(pool)
    with pytest.raises(InvalidMedia, match=reason) as caught:
        await pool.decode(media(data))
    assert caught.value.param == "prompt[0]"
    await pool.decode(media(png()))
    assert pids(pool) == before


async def test_a_heic_still_is_decoded_in_the_process(pool: DecodePool) -> None:
    heif.register()
    file = io.BytesIO()
    Image.effect_noise((40, 30), 80).convert("RGB").save(file, "HEIF")
    frames = await pool.decode(media(file.getvalue()))
    expected = resize(load_image(file.getvalue(), MediaLimits()), VISION)
    assert np.array_equal(np.frombuffer(frames.data, np.uint8).reshape(12, 12, 3), expected)
    assert frames.size == (40, 30)


async def test_a_process_that_dies_fails_its_media_item_and_is_replaced(
    pool: DecodePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = DecodeProcess._exchange

    async def die(self: DecodeProcess, process: Process, request: Decode) -> Frames | Refused:
        os.kill(process.pid, signal.SIGKILL)
        return await exchange(self, process, request)

    with monkeypatch.context() as deadly:
        deadly.setattr(DecodeProcess, "_exchange", die)
        with pytest.raises(InvalidMedia, match="cannot be decoded"):
            await pool.decode(media(png()))
    assert (await pool.decode(media(png()))).shape == (1, 12, 12, 3)


async def test_a_process_that_dies_while_it_starts_is_no_fault_of_its_media_item(pool: DecodePool) -> None:
    decoding = asyncio.create_task(pool.decode(media(png())))
    await eventually(lambda: pids(pool) != set())
    (pid,) = pids(pool)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(Unavailable, match="cannot start a process"):
        await decoding
    assert (await pool.decode(media(png()))).shape == (1, 12, 12, 3)
    assert pid not in pids(pool)


async def test_a_process_gives_way_to_the_others_of_the_server(pool: DecodePool) -> None:
    """Its lower priority counts only within their session; a Ctrl-C is not for it, so its process group is its own."""
    await pool.decode(media(png()))
    (pid,) = pids(pool)
    niceness = os.getpriority(os.PRIO_PROCESS, 0) + NICENESS
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(niceness, MAX_NICENESS)
    assert (os.getsid(pid), os.getpgid(pid)) == (os.getsid(0), pid)


async def test_a_process_that_died_while_idle_costs_no_media_item(pool: DecodePool) -> None:
    await pool.decode(media(png()))
    (pid,) = pids(pool)
    os.kill(pid, signal.SIGKILL)
    assert (await pool.decode(media(png()))).shape == (1, 12, 12, 3)
    assert pid not in pids(pool)


async def test_stored_bytes_are_read_by_a_thread_just_before_decoding(pool: DecodePool) -> None:
    def read() -> bytes:
        threads.append(threading.current_thread())
        return png("blue", (7, 5))

    threads: list[threading.Thread] = []
    stored = replace(media(b""), source=read)
    frames = await pool.decode(stored)
    assert (tuple(frames.data[:3]), frames.size) == ((0, 0, 255), (7, 5))
    assert [thread is threading.main_thread() for thread in threads] == [False]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), TimeoutError()])
async def test_bytes_that_cannot_be_read_are_no_fault_of_the_image_or_its_process(
    pool: DecodePool, error: OSError, caplog: pytest.LogCaptureFixture
) -> None:
    def read() -> bytes:
        raise error

    await pool.decode(media(png()))
    before = pids(pool)
    with pytest.raises(StorageUnavailable, match="the bytes of this image cannot be read") as caught:
        await pool.decode(replace(media(b""), source=read))
    assert caught.value.param == "prompt[0]"
    assert [record.message for record in caplog.records] == ["a media item cannot be read"]
    assert pids(pool) == before


async def test_deleted_media_cost_no_process(pool: DecodePool) -> None:
    def read() -> bytes:
        raise MediaNotFound("deleted", param="prompt[0]")

    await pool.decode(media(png()))
    before = pids(pool)
    with pytest.raises(MediaNotFound, match="deleted"):
        await pool.decode(replace(media(b""), source=read))
    await pool.decode(media(png()))
    assert pids(pool) == before


async def test_video_limits_are_those_of_the_settings() -> None:
    settings = Settings(decode_processes=1, max_video_frames=4, max_video_seconds=9, video_fps=2)
    pool = DecodePool(VISION, settings)
    assert (await pool.decode(media(film(["red", "blue"]), "video"))).shape[0] == 4
    with pytest.raises(InvalidMedia, match=r"more than 4 frames at 2\.0 per second"):
        await pool.decode(media(film(["red", "blue", "red"]), "video"))
    await pool.stop()
    pool = DecodePool(VISION, settings.model_copy(update={"max_video_frames": 64}))
    with pytest.raises(InvalidMedia, match=r"longer than 9\.2 seconds, the limit is 9\.0"):
        await pool.decode(media(film(["red"] * 10), "video"))
    await pool.stop()


async def test_a_process_has_a_memory_limit(pool: DecodePool, settings: Settings) -> None:
    await pool.decode(media(png()))
    (pid,) = pids(pool)
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert f"Max address space         {settings.decode_memory_mb * 2**20}" in limits


async def test_the_time_in_which_a_process_starts_is_not_that_of_decoding(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", slowly_started(tmp_path))
    pool = DecodePool(VISION, settings.model_copy(update={"decode_timeout": 1.0}))
    assert (await pool.decode(media(png()))).shape == (1, 12, 12, 3)
    await pool.stop()


async def test_a_process_that_does_not_start_is_no_fault_of_its_media_item(
    pool: DecodePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/bin/true")
        with pytest.raises(Unavailable, match="cannot start a process"):
            await pool.decode(media(png()))
    assert pids(pool) == set()
    assert (await pool.decode(media(png()))).shape == (1, 12, 12, 3)


async def test_without_file_descriptors_for_a_process_a_media_item_is_not_invalid(
    pool: DecodePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def spawn(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as exhausted:
        exhausted.setattr(asyncio, "create_subprocess_exec", spawn)
        with pytest.raises(Unavailable, match="cannot start a process"):
            await pool.decode(media(png()))
    assert (await pool.decode(media(png()))).shape == (1, 12, 12, 3)


async def test_media_wait_for_a_free_process(pool: DecodePool) -> None:
    colours = ["red", "green", "blue", "white"]
    frames = await asyncio.gather(*(pool.decode(media(png(colour))) for colour in colours))
    assert [tuple(decoded.data[:3]) for decoded in frames] == [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)]
    assert len(pids(pool)) == 1


async def test_a_suspended_process_is_replaced(pool: DecodePool) -> None:
    await pool.decode(media(png()))
    (pid,) = pids(pool)
    os.kill(pid, signal.SIGSTOP)
    pool._processes[0]._timeout = 600
    await pool.decode(media(png("blue")))
    assert pid not in pids(pool)
    await eventually(lambda: not is_alive(pid))


async def test_a_stuck_process_is_killed_after_the_timeout(pool: DecodePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.media.decode_process.LOOK_SECONDS", 60)
    await pool.decode(media(png()))
    (pid,) = pids(pool)
    os.kill(pid, signal.SIGSTOP)
    pool._processes[0]._timeout = 0.2
    with pytest.raises(Unavailable, match="too much other work") as caught:
        await pool.decode(media(png()))
    assert caught.value.param == "prompt[0]"
    assert pids(pool) == set()
    await eventually(lambda: not is_alive(pid))


async def test_the_time_of_decoding_is_that_of_the_processor(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.media.decode_process.LOOK_SECONDS", 60)
    # a busy machine may take long to give the process its quarter of a second
    monkeypatch.setattr("server.media.pool.WAIT_FACTOR", 1000)
    updates = {"decode_timeout": 0.25, "max_media_pixels": 10**8, "max_request_pixels": 10**8}
    pool = DecodePool(VISION, settings.model_copy(update=updates))
    await pool.decode(media(png()))
    (pid,) = pids(pool)
    os.kill(pid, signal.SIGSTOP)
    decoding = asyncio.create_task(pool.decode(media(png("blue"))))
    await asyncio.sleep(0.5)
    os.kill(pid, signal.SIGCONT)
    await decoding
    with pytest.raises(InvalidMedia, match=r"took longer than 0\.25 seconds of processor time"):
        await pool.decode(media(png("red", size=(9999, 9999))))
    await eventually(lambda: not is_alive(pid))
    assert pids(pool) == set()


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_a_cancelled_decode_does_not_affect_the_next(pool: DecodePool) -> None:
    await pool.decode(media(png()))
    cancelled = asyncio.create_task(pool.decode(media(png("blue"))))
    await asyncio.sleep(0)
    cancelled.cancel()
    frames = await pool.decode(media(png("red")))
    assert tuple(frames.data[:3]) == (255, 0, 0)


async def test_a_cancelled_decode_leaves_the_queue(pool: DecodePool) -> None:
    """A client that sends many images and leaves does not delay the next client's image."""
    await pool.decode(media(png()))
    (pid,) = pids(pool)
    os.kill(pid, signal.SIGSTOP)
    pool._processes[0]._timeout = 600
    read: list[int] = []

    def recorded(number: int) -> EncodedMedia:
        def read_bytes() -> bytes:
            read.append(number)
            return png()

        return replace(media(b""), source=read_bytes)

    decoding = [asyncio.create_task(pool.decode(recorded(number))) for number in range(8)]
    await eventually(lambda: read == [0])
    for task in decoding:
        task.cancel()
    await asyncio.gather(*decoding, return_exceptions=True)
    next_image = asyncio.create_task(pool.decode(media(png("red"))))
    # the process stays stopped: what it was decoding is ended by killing it
    assert tuple((await asyncio.wait_for(next_image, 60)).data[:3]) == (255, 0, 0)
    assert (read, pid in pids(pool)) == ([0], False)


async def test_a_decode_without_a_request_may_finish(pool: DecodePool) -> None:
    await pool.decode(media(png()))
    before = pids(pool)
    for _ in range(3):
        cancelled = asyncio.create_task(pool.decode(media(noise())))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        await pool.decode(media(png()))
    assert pids(pool) == before


async def test_requests_take_turns(pool: DecodePool) -> None:
    decoded: list[str] = []

    async def decode(name: str, requester: Requester) -> None:
        await pool.decode(media(png()), Job(requester))
        decoded.append(name)

    large, small = Requester(), Requester()
    tasks = [asyncio.create_task(decode("large", large)) for _ in range(5)]
    await asyncio.sleep(0)
    tasks += [asyncio.create_task(decode("small", small)) for _ in range(2)]
    await asyncio.gather(*tasks)
    assert decoded[:4] == ["large", "small", "large", "small"]


async def test_the_pixels_of_a_request_have_a_limit(settings: Settings) -> None:
    pool = DecodePool(VISION, settings.model_copy(update={"max_request_pixels": 500}))
    job = Job(Requester())
    for colour in ("red", "blue", "red"):  # again, as after an eviction
        await pool.decode(media(png(colour, size=(20, 10))), job)
    with pytest.raises(TooManyPixels, match="have 600 pixels up to this item, the limit is 500") as caught:
        await pool.decode(media(png("green", size=(20, 10))), job)
    assert caught.value.param == "prompt[0]"
    await pool.decode(media(png("green", size=(10, 10))), job)
    job.add(Requester())
    await pool.decode(media(png("green", size=(20, 10))), job)
    await pool.stop()


async def test_the_pool_may_be_stopped_twice(pool: DecodePool) -> None:
    await pool.decode(media(png()))
    await pool.stop()
    await pool.stop()
    assert not pids(pool)
    with pytest.raises(Unavailable, match="the decode pool is stopped"):
        await pool.decode(media(png()))


async def test_a_pool_that_is_stopped_while_a_process_starts_leaves_none(
    pool: DecodePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = asyncio.create_subprocess_exec

    async def start_meanwhile(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        process = await start(*arguments, **options)
        await pool.stop()
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_meanwhile)
    with pytest.raises(Unavailable):
        await pool.decode(media(png()))
    assert not pids(pool)


async def test_a_process_whose_reply_is_no_longer_read_can_be_stopped(settings: Settings) -> None:
    pool = DecodePool(replace(VISION, image_size=1500), settings)
    await pool.decode(media(png()))
    process = pool._processes[0]._process
    assert process is not None
    assert process.stdout is not None
    decoding = asyncio.create_task(pool._processes[0].decode(Decode(kind="image", data=png())))
    while len(process.stdout._buffer) < 2**17:  # type: ignore[attr-defined]
        await asyncio.sleep(0)
    stopping = asyncio.create_task(pool.stop())
    await asyncio.sleep(0)  # the process is killed, and the rest of its reply is still in the pipe
    decoding.cancel()
    await asyncio.wait_for(stopping, 60)
