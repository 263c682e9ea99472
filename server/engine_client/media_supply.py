"""Decodes media when the worker requests their pixels: each item once, for all requests that show it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from server.engine_client.supervisor import WorkerProcess
from server.errors import EngineFailed, InvalidMedia, MediaNotFound, ServerError
from server.media.decoder import Frames
from server.media.source import EncodedMedia
from server.metrics import Metrics
from server.wire import MAX_MESSAGE_BYTES, Event, Finished, MediaFailed, MediaPixels, Reply

MAX_FRAME_BYTES = MAX_MESSAGE_BYTES - 2**16

logger = logging.getLogger(__name__)


class MediaDecoder(Protocol):
    async def decode(self, media: EncodedMedia) -> Frames: ...

    async def stop(self) -> None: ...


@dataclass(slots=True)
class OpenRequest:
    """A request that the worker has not finished: its media by digest, and the events that are still to be read.

    `media_error` says why one of the media could not be decoded.
    """

    media: Mapping[bytes, EncodedMedia]
    media_error: ServerError | None = None
    events: asyncio.Queue[Event | Reply | ServerError] = field(default_factory=asyncio.Queue)
    is_finished: bool = False

    async def next(self) -> Event | Reply:
        """Return the next event. Raises the error that the request failed with."""
        event = await self.events.get()
        if isinstance(event, ServerError):
            raise event
        if isinstance(event, Finished) and event.finish_reason == "error":
            self.is_finished = True
            raise self.media_error or EngineFailed(event.error or "the engine could not finish this request")
        return event


class MediaSupply:
    """Supplies the media of the `open_requests`, which are by id."""

    def __init__(self, decoder: MediaDecoder, metrics: Metrics, open_requests: Mapping[str, OpenRequest]) -> None:
        self._decoder = decoder
        self._metrics = metrics
        self._open = open_requests
        self._decoding: dict[bytes, asyncio.Task[None]] = {}

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
        offers = [request.media[digest] for request in self._open.values() if digest in request.media]
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
        for request in self._open.values():
            if digest in request.media:
                request.media_error = type(error)(error.message, param=request.media[digest].param)
        worker.send(MediaFailed(digest=digest, message=error.message))


def _check_size(frames: Frames, media: EncodedMedia) -> None:
    if len(frames.data) > MAX_FRAME_BYTES:
        raise InvalidMedia(f"{len(frames.data)} bytes of frames, the limit is {MAX_FRAME_BYTES}", param=media.param)
