"""The decode pool: a few processes, each decoding one media item at a time.

A process that crashes or takes too long fails only its media item. Processes start on first use; a process that is
lost is replaced.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from pathlib import Path

from model.config import VisionConfig
from model.media import MediaLimits
from server.errors import InvalidMedia
from server.media.decoder import LENGTH_BYTES, Decode, Frames, Refused, Setup, decode_reply, with_length
from server.media.source import EncodedMedia, Kind
from server.settings import Settings, child_environment

ROOT = Path(__file__).resolve().parents[2]

logger = logging.getLogger(__name__)


class DecodePool:
    """Decodes media in processes, for the given vision encoder and within the limits of the settings."""

    def __init__(self, vision: VisionConfig, settings: Settings) -> None:
        limits = MediaLimits(
            max_bytes=settings.max_media_bytes,
            max_pixels=settings.max_media_pixels,
            max_frames=settings.max_video_frames,
            max_seconds=settings.max_video_seconds,
            frames_per_second=settings.video_fps,
        )
        self._setup = Setup(
            vision=dataclasses.asdict(vision),
            limits=dataclasses.asdict(limits),
            max_memory_bytes=settings.decode_memory_mb * 2**20,
        )
        self._timeout = settings.decode_timeout
        # the most recently used process is taken first: it is warm; None stands for one that has not started
        self._idle: asyncio.LifoQueue[Process | None] = asyncio.LifoQueue()
        self._processes: set[Process] = set()
        for _ in range(settings.decode_processes):
            self._idle.put_nowait(None)

    async def decode(self, media: EncodedMedia) -> Frames:
        """Decode an image or video.

        Raises `InvalidMedia`, which names its path in the request, and `MediaNotFound` if its stored bytes have been
        deleted.
        """
        process = await self._idle.get()
        try:
            # read only now: media that wait for a process take no memory
            data = await media.read()
            process = process or await self._start()
            reply = await self._request(process, media.kind, data)
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            logger.warning("a decode process was lost", extra={"error": type(error).__name__, "media": media.id})
            raise InvalidMedia(self._reason(media, error), param=media.param) from None
        finally:
            self._idle.put_nowait(process if process in self._processes else None)
        if isinstance(reply, Refused):
            raise InvalidMedia(reply.message, param=media.param)
        return reply

    async def stop(self) -> None:
        """Stop all processes. It may be called twice: the engine's client and the server share a pool."""
        while self._processes:
            process = self._processes.pop()
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _start(self) -> Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "server.media.decoder"),
            stdin=PIPE,
            stdout=PIPE,
            cwd=ROOT,
            env=child_environment(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1"),
            start_new_session=True,
        )
        self._processes.add(process)
        _stdin(process).write(with_length(self._setup))
        return process

    async def _request(self, process: Process, kind: Kind, data: bytes) -> Frames | Refused:
        """Send a request and read its reply.

        Any failure, cancellation included, kills the process, since its next reply could belong to this request.
        """
        try:
            async with asyncio.timeout(self._timeout):
                _stdin(process).write(with_length(Decode(kind=kind, data=data)))
                await _stdin(process).drain()
                assert process.stdout is not None
                length = await process.stdout.readexactly(LENGTH_BYTES)
                return decode_reply.decode(await process.stdout.readexactly(int.from_bytes(length, "little")))
        except BaseException:
            self._kill(process)
            raise

    def _kill(self, process: Process) -> None:
        self._processes.discard(process)
        if process.returncode is None:
            process.kill()

    def _reason(self, media: EncodedMedia, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"decoding this {media.kind} took longer than {self._timeout:g} seconds"
        return f"this {media.kind} cannot be decoded"


def _stdin(process: Process) -> asyncio.StreamWriter:
    assert process.stdin is not None
    return process.stdin
