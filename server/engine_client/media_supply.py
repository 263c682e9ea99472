"""Decodes media when the worker requests their pixels: each item once, for all requests that show it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from server.engine_client.supervisor import WorkerProcess
from server.errors import InvalidMedia, MediaNotFound, ServerError
from server.media.decoder import Frames
from server.media.source import EncodedMedia
from server.metrics import Metrics
from server.wire import MAX_MESSAGE_BYTES, MediaFailed, MediaPixels

MAX_FRAME_BYTES = MAX_MESSAGE_BYTES - 2**16

logger = logging.getLogger(__name__)


class MediaDecoder(Protocol):
    async def decode(self, media: EncodedMedia) -> Frames: ...

    async def stop(self) -> None: ...


@dataclass(slots=True, eq=False)
class RequestMedia:
    """The media of one open request by digest. `error` says why one of them could not be decoded."""

    by_digest: Mapping[bytes, EncodedMedia]
    error: ServerError | None = None


class MediaSupply:
    def __init__(self, decoder: MediaDecoder, metrics: Metrics) -> None:
        self._decoder = decoder
        self._metrics = metrics
        self._open: set[RequestMedia] = set()
        self._decoding: dict[bytes, asyncio.Task[None]] = {}

    @contextmanager
    def offer(self, by_digest: Mapping[bytes, EncodedMedia]) -> Iterator[RequestMedia]:
        """Offer the media of a request while it is open."""
        media = RequestMedia(by_digest)
        self._open.add(media)
        try:
            yield media
        finally:
            self._open.discard(media)

    def send(self, digest: bytes, worker: WorkerProcess) -> None:
        """Decode and send a media item.

        The worker requests it only once, so it always gets an answer, even if all requests that show the media item have
        ended.
        """
        if digest in self._decoding:
            return
        media = self._offered(digest)
        if media is None:
            message = "the requests that show this media item have ended"
            worker.send(MediaFailed(digest=digest, message=message))
            return
        task = self._decoding[digest] = asyncio.create_task(self._decode_and_send(media, worker))
        task.add_done_callback(lambda done: self._forget(digest, done))

    def cancel(self) -> None:
        """Cancel all decoding: the worker that requested it is dead."""
        for task in self._decoding.values():
            task.cancel()
        self._decoding.clear()

    async def stop(self) -> None:
        await self._decoder.stop()

    def _offered(self, digest: bytes) -> EncodedMedia | None:
        """Return the media item from any open request, preferably with its bytes: a stored one may be deleted."""
        offers = [media.by_digest[digest] for media in self._open if digest in media.by_digest]
        return max(offers, key=lambda media: media.is_in_memory, default=None)

    def _forget(self, digest: bytes, done: asyncio.Task[None]) -> None:
        # the next worker may have requested the same media again
        if self._decoding.get(digest) is done:
            del self._decoding[digest]

    async def _decode_and_send(self, media: EncodedMedia, worker: WorkerProcess) -> None:
        started = time.monotonic()
        try:
            frames = await self._decode(media)
            _check_size(frames, media)
        except ServerError as error:  # it cannot be decoded, or has been deleted
            self._fail(media.digest, error, worker)
        except Exception:
            logger.exception("a media item could not be decoded")
            self._fail(media.digest, InvalidMedia("decoding failed"), worker)
        else:
            self._metrics.media_decode.observe(time.monotonic() - started)
            worker.send(MediaPixels(digest=media.digest, shape=frames.shape, data=frames.data))

    async def _decode(self, media: EncodedMedia) -> Frames:
        try:
            return await self._decoder.decode(media)
        except MediaNotFound:
            other = self._offered(media.digest)  # a request with its bytes may have come meanwhile
            if other is None or not other.is_in_memory:
                raise
            return await self._decoder.decode(other)

    def _fail(self, digest: bytes, error: ServerError, worker: WorkerProcess) -> None:
        self._metrics.media_decode_failures.inc()
        for media in self._open:
            if digest in media.by_digest:
                media.error = type(error)(error.message, param=media.by_digest[digest].param)
        worker.send(MediaFailed(digest=digest, message=error.message))


def _check_size(frames: Frames, media: EncodedMedia) -> None:
    if len(frames.data) > MAX_FRAME_BYTES:
        raise InvalidMedia(f"{len(frames.data)} bytes of frames, the limit is {MAX_FRAME_BYTES}", param=media.param)
