"""Decodes media when the worker requests their pixels: each item once, for all requests that show it.

The worker holds frames until they are encoded. The frames of one request have a limit, and so have those of all open
requests together. Above the latter, only the oldest open request without an answer gets more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.engine_client.worker_process import WorkerProcess
from server.errors import (
    EngineFailed,
    InvalidMedia,
    InvalidRequest,
    MediaNotFound,
    Overloaded,
    ServerError,
    StorageUnavailable,
)
from server.media.decoder import Frames
from server.media.source import EncodedMedia
from server.media.turns import DecodeTurns, Job, Requester
from server.settings import Settings
from server.telemetry.metrics import Metrics
from server.telemetry.stages import Stages, current
from server.wire import MAX_MESSAGE_BYTES, Event, Finished, MediaFailed, MediaPixels, Reply

MAX_FRAME_BYTES = MAX_MESSAGE_BYTES - 2**16
ENDED = "the requests that show this media item have ended"

logger = logging.getLogger(__name__)


class MediaDecoder(Protocol):
    turns: DecodeTurns[Any]

    async def decode(self, media: EncodedMedia, job: Job | None = None) -> Frames: ...

    async def stop(self) -> None: ...


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A request that the worker has not finished: its media by digest, and the events that are still to be read.

    `media_errors` are those of media that could not be decoded, by their message.
    """

    media: Mapping[bytes, EncodedMedia]
    media_errors: dict[str, ServerError] = field(default_factory=dict)
    events: asyncio.Queue[Event | Reply | ServerError] = field(default_factory=asyncio.Queue)
    is_finished: bool = False
    requester: Requester = field(default_factory=Requester)
    is_encoded: bool = False
    stages: Stages = field(default_factory=current.get)

    async def next(self) -> Event | Reply:
        """Return the next event. Raises the error that the request failed with."""
        event = await self.events.get()
        if isinstance(event, ServerError):
            raise event
        if isinstance(event, Finished) and event.finish_reason == "error":
            self.is_finished = True
            if event.param:
                raise InvalidRequest(event.error, param=event.param)
            if event.is_temporary:
                raise Overloaded(event.error)
            # a request may also fail for another reason, after it has read the media item
            known = self.media_errors.get(event.error)
            raise known or EngineFailed(event.error or "the engine could not finish this request")
        return event


@dataclass(frozen=True, slots=True)
class _Decoding:
    """A media item that a worker waits for."""

    job: Job
    task: asyncio.Task[None]
    worker: WorkerProcess


class MediaSupply:
    """Supplies the media of the `open_requests`, which are by id, in the order of arrival."""

    def __init__(
        self, decoder: MediaDecoder, metrics: Metrics, settings: Settings, open_requests: Mapping[str, OpenRequest]
    ) -> None:
        self._decoder = decoder
        self._metrics = metrics
        self._max_request_bytes = settings.max_request_frames_bytes
        self._max_open_bytes = settings.max_open_frames_bytes
        self._open = open_requests
        self._decoding: dict[bytes, _Decoding] = {}
        self._num_waiting: Counter[bytes] = Counter()  # open requests with media that are not all encoded, by digest
        self._held: dict[bytes, int] = {}  # bytes of the frames that the worker may hold for these

    def begin(self, request: OpenRequest) -> None:
        """Offer the media of a request that has just been opened."""
        self._num_waiting.update(request.media.keys())
        self._balance()
        for digest in self._decoding.keys() & request.media.keys():
            self._decoding[digest].job.add(request.requester)
        self._decoder.turns.grant()

    def end(self, request: OpenRequest) -> None:
        """Stop decoding media that only this request needs: it is no longer open."""
        self._let_go(request)
        self._balance()
        for digest in self._decoding.keys() & request.media.keys():
            self._withdraw(digest, request.requester)
        self._decoder.turns.grant()

    def send(self, digest: bytes, worker: WorkerProcess) -> None:
        """Decode and send a media item.

        The worker requests it only once, so it always gets an answer, even if all requests that show the media item have
        ended.
        """
        if digest in self._decoding:
            return
        media = self._offered(digest)
        if media is None:
            worker.send(MediaFailed(digest=digest, message=ENDED))
            return
        job = Job(*(request.requester for request in self._showing(digest)))
        task = asyncio.create_task(self._decode_and_send(media, job, worker))
        decoding = self._decoding[digest] = _Decoding(job, task, worker)
        task.add_done_callback(lambda done: self._forget(digest, decoding))

    def release(self, request: OpenRequest) -> None:
        """Note that the worker has encoded all media of a request, so that it holds none of their frames.

        It holds none for the other requests that show them either.
        """
        if self._let_go(request):
            for digest in request.media:
                self._held.pop(digest, None)
            self._balance()
            self._decoder.turns.grant()

    def cancel(self) -> None:
        """Cancel all decoding: the worker that requested it is dead."""
        for decoding in self._decoding.values():
            decoding.task.cancel()
        self._decoding.clear()

    async def stop(self) -> None:
        self.cancel()
        await self._decoder.stop()

    def _withdraw(self, digest: bytes, requester: Requester) -> None:
        """Remove a request that has ended from those that need a media item; without any, its decoding is cancelled.

        The worker is answered at once, before it receives a later request that needs the media item again.
        """
        decoding = self._decoding[digest]
        if decoding.job.requesters != {requester}:
            decoding.job.discard(requester)
        elif not decoding.task.done():
            # the job stays that of its client, which has the decode process until it is idle
            del self._decoding[digest]
            decoding.task.cancel()
            decoding.worker.send(MediaFailed(digest=digest, message=ENDED))

    def _showing(self, digest: bytes) -> list[OpenRequest]:
        """Return the open requests that show a media item."""
        return [request for request in self._open.values() if digest in request.media]

    def _offered(self, digest: bytes, tried: Collection[EncodedMedia] = ()) -> EncodedMedia | None:
        """Return the media item from any open request, preferably with its bytes: a stored one may be deleted."""
        offered = [request.media[digest] for request in self._showing(digest)]
        untried = [media for media in offered if media not in tried]
        return max(untried, key=lambda media: media.is_in_memory, default=None)

    def _forget(self, digest: bytes, decoding: _Decoding) -> None:
        # the same media item may have been requested again
        if self._decoding.get(digest) is decoding:
            del self._decoding[digest]

    async def _decode_and_send(self, media: EncodedMedia, job: Job, worker: WorkerProcess) -> None:
        started = time.monotonic()
        try:
            frames = await self._decode(media, job)
            self._count(frames, media, job)
        except ServerError as error:  # it cannot be decoded, or has been deleted
            self._fail(media.digest, error, worker)
        except Exception:
            logger.exception("a media item could not be decoded")
            self._fail(media.digest, InvalidMedia("decoding failed"), worker)
        else:
            seconds = time.monotonic() - started
            self._metrics.media_decode.observe(seconds)
            for request in self._showing(media.digest):
                request.stages.note("media.decode", seconds)
            worker.send(MediaPixels(digest=media.digest, shape=frames.shape, data=frames.data))

    async def _decode(self, media: EncodedMedia, job: Job) -> Frames:
        """Decode a media item from the first request that still has it: tenants that share caches have files of their own.

        A request that has it may also arrive meanwhile. Raises `MediaNotFound` or `StorageUnavailable` if there is none.
        """
        tried = set[EncodedMedia]()
        while True:
            try:
                return await self._decoder.decode(media, job)
            except (MediaNotFound, StorageUnavailable):
                tried.add(media)
                if (other := self._offered(media.digest, tried)) is None:
                    raise
                media = other

    def _count(self, frames: Frames, media: EncodedMedia, job: Job) -> None:
        """Count the bytes of frames. Raises `InvalidMedia` if they are too many for every request that needs them."""
        num_bytes = len(frames.data)
        if num_bytes > MAX_FRAME_BYTES:
            raise InvalidMedia(f"{num_bytes} bytes of frames, the limit is {MAX_FRAME_BYTES}", param=media.param)
        if (total := job.frame_bytes_before(media.digest) + num_bytes) > self._max_request_bytes:
            message = f"the frames of this request have {total} bytes up to this media item"
            raise InvalidMedia(f"{message}, the limit is {self._max_request_bytes}", param=media.param)
        for request in self._showing(media.digest):
            request.requester.frame_bytes.record(media.digest, num_bytes)
        if media.digest in self._num_waiting:
            self._held[media.digest] = num_bytes
        self._balance()

    def _let_go(self, request: OpenRequest) -> bool:
        """Note that a request needs no frames any more, and return whether it did until now."""
        if request.is_encoded:
            return False
        request.is_encoded = True
        self._num_waiting.subtract(request.media.keys())
        for digest in [digest for digest in request.media if not self._num_waiting[digest]]:
            del self._num_waiting[digest]
            self._held.pop(digest, None)
        return True

    def _balance(self) -> None:
        """Pause all requests except one while the worker may hold too many frames; that one will release some.

        A request without media releases none, however long it takes.
        """
        requests = self._open.values()
        is_full = sum(self._held.values()) > self._max_open_bytes
        first = next((request for request in requests if request.media and not request.is_encoded), None)
        for request in requests:
            request.requester.is_paused = is_full and request is not first

    def _fail(self, digest: bytes, error: ServerError, worker: WorkerProcess) -> None:
        self._metrics.media_decode_failures.inc()
        for request in self._showing(digest):
            failure = type(error)(error.message, param=request.media[digest].param)
            request.media_errors.setdefault(error.message, failure)
        worker.send(MediaFailed(digest=digest, message=error.message))
