"""The decode pool: a few processes, each of which decodes one media item at a time; requests take turns.

If a process crashes or takes too long, only its media item fails. A media item that no request needs any more leaves the
queue. If it is being decoded, its process gets a short time to finish, which is cheaper than to start another one. The pool
holds the bytes of media that are being decoded, but not of those that wait.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging

from model.config import VisionConfig
from model.media import MediaLimits
from server.errors import InvalidMedia, StorageUnavailable, TooManyPixels, Unavailable
from server.media.decode_process import LOST, DecodeProcess, NotStarted, TookTooLong
from server.media.decoder import Decode, Frames, Refused, Setup
from server.media.source import EncodedMedia
from server.media.turns import DecodeTurns, Job, Requester
from server.settings import Settings

# a loaded machine gives a process its processor time within this number of times as long
WAIT_FACTOR = 3
# Seconds in which almost every image is read and decoded, without waits for a processor, although a small file can take as
# long as `decode_timeout`. An image that takes longer must not keep those of other clients waiting: the pool checks this
# every `LOOK_SECONDS`.
SHORT_SECONDS = 0.5
LOOK_SECONDS = 0.1
# about the time in which a process starts
ABANDONED_SECONDS = 0.5

logger = logging.getLogger(__name__)


class DecodePool:
    """Decodes media in processes, for the given vision encoder and within the limits of the settings."""

    def __init__(self, vision: VisionConfig, settings: Settings) -> None:
        limits = MediaLimits(
            max_bytes=settings.max_media_bytes,
            max_pixels=settings.max_media_pixels,
            max_total_pixels=settings.max_request_pixels,
            max_frames=settings.max_video_frames,
            max_seconds=settings.max_video_seconds,
            frames_per_second=settings.video_fps,
        )
        setup = Setup(
            vision=dataclasses.asdict(vision),
            limits=dataclasses.asdict(limits),
            max_memory_bytes=settings.decode_memory_mb * 2**20,
            max_seconds=settings.decode_timeout,
        )
        self._timeout = settings.decode_timeout
        wait = WAIT_FACTOR * self._timeout
        self._processes = [DecodeProcess(setup, wait) for _ in range(settings.decode_processes)]
        self.turns = DecodeTurns(self._processes)

    async def decode(self, media: EncodedMedia, job: Job | None = None) -> Frames:
        """Decode an image or video when it is the turn of its job; None: a job of its own.

        Raises `InvalidMedia`, which names its path in the request, `Unavailable` if no process could be started or had the
        time for it, `StorageUnavailable` if its bytes cannot be read, and `MediaNotFound` if they have been deleted.
        """
        job = job or Job(Requester())
        try:
            reply = await self._attempt(media, job, is_long=media.kind == "video")
        except (*LOST, TookTooLong, NotStarted) as error:
            logger.warning("a decode process was lost", extra={"error": repr(error), "media": media.id})
            raise self._failure(media, error) from None
        self.turns.record_end(job)
        if isinstance(reply, Refused):
            if reply.unexpected:
                logger.error("decoding failed", extra={"error": reply.unexpected, "media": media.id})
            raise (TooManyPixels if reply.too_many_pixels else InvalidMedia)(reply.message, param=media.param)
        return reply

    async def stop(self) -> None:
        """Stop all processes. It may be called twice: the engine's client and the server share a pool."""
        for process in self._processes:
            await process.stop()

    async def _attempt(self, media: EncodedMedia, job: Job, *, is_long: bool) -> Frames | Refused:
        """Return the reply of a process. If it is taken from a slow job, the job begins again as a long one."""
        process = await self.turns.take(job, is_long=is_long)
        process.begin_work()
        decoding = asyncio.create_task(self._decode(process, media, job))
        try:
            await asyncio.wait({decoding}, timeout=SHORT_SECONDS)
            while not (job.is_long or decoding.done()):
                self.turns.grant()
                if process.seconds_of_work() >= SHORT_SECONDS and not self.turns.try_to_keep(process, job):
                    decoding.cancel()  # which kills the process
                    await asyncio.wait({decoding})
                    return await self._attempt(media, job, is_long=True)
                await asyncio.wait({decoding}, timeout=LOOK_SECONDS)
            return await asyncio.shield(decoding)
        except asyncio.CancelledError:
            _abandon(decoding)
            raise

    async def _decode(self, process: DecodeProcess, media: EncodedMedia, job: Job) -> Frames | Refused:
        try:
            # read only now, so that media that wait for a process take no memory
            try:
                data = await media.read()
            except OSError as error:
                logger.error("a media item cannot be read", extra={"error": repr(error), "media": media.id})
                raise StorageUnavailable(f"the bytes of this {media.kind} cannot be read", param=media.param) from None
            num_pixels = job.pixels_before(media.digest)
            reply = await process.decode(Decode(kind=media.kind, data=data, num_pixels=num_pixels))
            if isinstance(reply, Frames):
                # before the process is given to the next item, which may be of the same request
                for requester in job.requesters:
                    requester.pixels.record(media.digest, reply.num_pixels)
            return reply
        finally:
            self.turns.give_back(process)

    def _failure(self, media: EncodedMedia, error: Exception) -> InvalidMedia | Unavailable:
        if isinstance(error, TimeoutError):
            message = f"this {media.kind} cannot be decoded now: the server has too much other work"
            return Unavailable(message, param=media.param)
        if isinstance(error, NotStarted):
            message = f"this {media.kind} cannot be decoded now: the server cannot start a process for it"
            return Unavailable(message, param=media.param)
        if isinstance(error, TookTooLong):
            message = f"decoding this {media.kind} took longer than {self._timeout:g} seconds of processor time"
            return InvalidMedia(message, param=media.param)
        return InvalidMedia(f"this {media.kind} cannot be decoded", param=media.param)


def _abandon(decoding: asyncio.Task[Frames | Refused]) -> None:
    """Let the process finish for a moment, then kill it; no request waits for the result."""
    deadline = asyncio.get_running_loop().call_later(ABANDONED_SECONDS, decoding.cancel)

    def forget(done: asyncio.Task[Frames | Refused]) -> None:
        deadline.cancel()
        if not done.cancelled():
            done.exception()  # mark it as seen

    decoding.add_done_callback(forget)
