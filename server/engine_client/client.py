"""The API process's side of the engine: requests in, their events out, media on demand, and a worker kept alive.

A dead worker fails the requests that were in it, and is started again with growing pauses; meanwhile new requests are
refused. Media are decoded only when the worker asks, once for all requests that show them.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import zmq
from numpy.typing import NDArray

from server.engine.worker import MAX_MESSAGE_BYTES
from server.engine_client.worker_process import WorkerProcess
from server.errors import EngineDied, EngineFailed, EngineNotReady, InvalidMedia, MediaNotFound, ServerError
from server.media.decoder import Frames
from server.media.source import EncodedMedia
from server.metrics import Metrics
from server.settings import Settings
from server.wire import (
    Abort,
    Beat,
    Embed,
    Embedded,
    EmbedText,
    Event,
    Finished,
    Generate,
    Inspect,
    Inspected,
    MediaFailed,
    MediaPixels,
    MediaWanted,
    Outbound,
    Pin,
    Ready,
    Reply,
    Request,
    Score,
    Scored,
    Token,
)

FACTORY = "server.engine.build:build"
FIRST_DELAY = 0.5
# a worker that served this long was healthy: the next pause is short again
HEALTHY_SECONDS = 60.0

State = Literal["starting", "ready", "restarting", "failed", "stopped"]

ReplyType = TypeVar("ReplyType", Scored, Embedded, Inspected)

logger = logging.getLogger(__name__)


class MediaDecoder(Protocol):
    async def decode(self, media: EncodedMedia) -> Frames: ...

    async def stop(self) -> None: ...


class Client(Protocol):
    """What the HTTP side needs of an engine."""

    @property
    def state(self) -> State: ...

    @property
    def info(self) -> dict[str, Any]: ...

    @property
    def step_age(self) -> float: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def fail_all(self, error: ServerError) -> None: ...

    def stream(self, request: Generate, media: Mapping[bytes, EncodedMedia]) -> AsyncGenerator[Event, None]: ...

    def end_answer(self, request_id: str, index: int) -> None:
        """One of several answers is wanted no further; its stream still ends it, with "abort"."""

    async def score(self, request: Score, media: Mapping[bytes, EncodedMedia]) -> Scored: ...

    async def inspect(self, request: Inspect, media: Mapping[bytes, EncodedMedia]) -> Inspected: ...

    async def embed(self, media: Sequence[EncodedMedia]) -> NDArray[np.float32]:
        """[M, Dv]: the frozen vision encoder's features, mean over frames and patches, of length one."""

    async def embed_text(self, texts: Sequence[list[int]]) -> NDArray[np.float32]:
        """[N, D]: the frozen language model's last hidden states without any media, mean over tokens, of length one."""

    def pin(self, digests: Sequence[bytes], is_kept: bool) -> None:
        """Ask to keep media on the device, or no longer. A hint: nothing tells whether there was room."""


@dataclass(slots=True)
class _Stream:
    """One request in the worker. `media_error` is why it will fail, once one of its media could not be decoded."""

    media: Mapping[bytes, EncodedMedia]
    events: asyncio.Queue[Event | Reply | ServerError] = field(default_factory=asyncio.Queue)
    media_error: ServerError | None = None
    is_over: bool = False

    async def next(self) -> Event | Reply:
        """Raises what the request failed with."""
        event = await self.events.get()
        if isinstance(event, ServerError):
            raise event
        if isinstance(event, Finished) and event.finish_reason == "error":
            self.is_over = True
            raise self.media_error or EngineFailed(event.error or "the engine gave this request up")
        return event


class EngineClient:
    def __init__(self, settings: Settings, decoder: MediaDecoder, metrics: Metrics, *, factory: str = FACTORY) -> None:
        self.state: State = "starting"
        self.info: dict[str, Any] = {}
        self._settings = settings
        self._decoder = decoder
        self._metrics = metrics
        self._factory = factory
        self._worker: WorkerProcess | None = None
        self._streams: dict[str, _Stream] = {}
        self._decoding: dict[bytes, asyncio.Task[None]] = {}
        self._heard = time.monotonic()
        self._settled = asyncio.Event()
        self._supervising: asyncio.Task[None] | None = None

    @property
    def step_age(self) -> float:
        """Seconds since the worker last showed progress, 0 without work. A worker that hangs sends nothing at all."""
        return time.monotonic() - self._heard if self._streams and self.state == "ready" else 0.0

    async def start(self) -> None:
        self._supervising = asyncio.create_task(self._supervise())

    async def loaded(self) -> None:
        """Returns when the first worker is ready; raises `EngineDied` when it died before."""
        await self._settled.wait()
        if self.state == "failed":
            raise EngineDied("the engine could not be started")

    async def stop(self) -> None:
        self.state = "stopped"
        if self._supervising is not None:
            self._supervising.cancel()
            with suppress(asyncio.CancelledError):
                await self._supervising
        self._end_life(EngineNotReady("the server is shutting down"))
        if self._worker is not None:
            await self._worker.stop()
        await self._decoder.stop()

    def fail_all(self, error: ServerError) -> None:
        for stream in self._streams.values():
            stream.events.put_nowait(error)

    async def stream(self, request: Generate, media: Mapping[bytes, EncodedMedia]) -> AsyncGenerator[Event, None]:
        """Events until each answer has its finish reason. Closed before that, it aborts the request."""
        with self._open(request, media) as stream:
            num_open = request.sampling.n
            while num_open:
                event = await stream.next()
                assert not isinstance(event, Reply)
                if isinstance(event, Token | Finished) and event.finish_reason is not None:
                    num_open -= 1
                stream.is_over = not num_open
                yield event

    def end_answer(self, request_id: str, index: int) -> None:
        if self._worker is not None and request_id in self._streams:
            self._worker.send(Abort(request_id, index))

    async def score(self, request: Score, media: Mapping[bytes, EncodedMedia]) -> Scored:
        return await self._ask(request, media, Scored)

    async def inspect(self, request: Inspect, media: Mapping[bytes, EncodedMedia]) -> Inspected:
        return await self._ask(request, media, Inspected)

    async def embed(self, media: Sequence[EncodedMedia]) -> NDArray[np.float32]:
        request = Embed(request_id=f"embed-{uuid.uuid4().hex}", media=[m.digest for m in media])
        return _vectors(await self._ask(request, {m.digest: m for m in media}, Embedded))

    async def embed_text(self, texts: Sequence[list[int]]) -> NDArray[np.float32]:
        request = EmbedText(request_id=f"embed-{uuid.uuid4().hex}", texts=list(texts))
        return _vectors(await self._ask(request, {}, Embedded))

    def pin(self, digests: Sequence[bytes], is_kept: bool) -> None:
        if self._worker is not None and self.state == "ready":
            self._worker.send(Pin(digests=list(digests), is_kept=is_kept))

    async def _ask(self, request: Request, media: Mapping[bytes, EncodedMedia], kind: type[ReplyType]) -> ReplyType:
        """A request that one event answers. Cancelled before that, it is aborted."""
        with self._open(request, media) as stream:
            while not isinstance(event := await stream.next(), kind):
                pass
            stream.is_over = True
            return event

    @contextmanager
    def _open(self, request: Request, media: Mapping[bytes, EncodedMedia]) -> Iterator[_Stream]:
        worker = self._ready_worker()
        stream = self._streams[request.request_id] = _Stream(media)
        if len(self._streams) == 1:
            self._heard = time.monotonic()
        try:
            worker.send(request)
            yield stream
        finally:
            del self._streams[request.request_id]
            if not stream.is_over and worker is self._worker:
                worker.send(Abort(request.request_id))

    def _ready_worker(self) -> WorkerProcess:
        if self._worker is None or self.state != "ready":
            raise EngineNotReady(f"the model is not ready: the engine is {self.state}")
        return self._worker

    # the worker's lives

    async def _supervise(self) -> None:
        delay, number = FIRST_DELAY, 0
        with tempfile.TemporaryDirectory(prefix="flamboyance-") as folder:  # made with mode 0700
            while True:
                started = time.monotonic()
                await self._live(Path(folder) / f"worker-{number}.sock")
                if not self._settled.is_set():
                    # a worker that was never ready will not be the next time: a wrong folder, too little memory
                    self.state = "failed"
                    self._settled.set()
                    return
                delay = FIRST_DELAY if time.monotonic() - started > HEALTHY_SECONDS else delay
                logger.warning("the worker is started again", extra={"delay_seconds": delay})
                await asyncio.sleep(delay)
                delay, number = min(delay * 2, self._settings.max_restart_delay), number + 1
                self._metrics.engine_restarts.inc()

    async def _live(self, socket_file: Path) -> None:
        """Start a worker and serve it until it is dead."""
        self._worker = await WorkerProcess.spawn(self._settings, self._factory, socket_file)
        receiving = asyncio.create_task(self._receive(self._worker))
        exiting = asyncio.create_task(self._worker.wait())
        try:
            await asyncio.wait({receiving, exiting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            receiving.cancel()
            exiting.cancel()
        if receiving.done() and not receiving.cancelled() and (error := receiving.exception()):
            logger.error("the worker sent what is no message", extra={"error": str(error)})
        worker, self._worker = self._worker, None
        self.state = "restarting"
        await worker.stop()
        logger.error("the worker died", extra={"exit_code": await worker.wait(), "requests": len(self._streams)})
        self._end_life(EngineDied("the engine died while it worked on this request; it is being restarted"))

    def _end_life(self, error: ServerError) -> None:
        self._metrics.engine_ready.set(0)
        self._metrics.engine.values = {}
        self.fail_all(error)
        for task in self._decoding.values():
            task.cancel()
        self._decoding.clear()

    # the worker's messages

    async def _receive(self, worker: WorkerProcess) -> None:
        with suppress(zmq.ZMQError):  # closed
            while True:
                self._take(await worker.receive(), worker)

    def _take(self, event: Outbound, worker: WorkerProcess) -> None:
        match event:
            case Beat():
                self._heard = time.monotonic() - event.last_step_age
                self._metrics.engine.values = event.gauges
            case Ready():
                self._become_ready(event.info)
            case MediaWanted():
                self._want(event.digest, worker)
            case _:
                self._heard = time.monotonic()
                if stream := self._streams.get(event.request_id):
                    stream.events.put_nowait(event)

    def _become_ready(self, info: dict[str, Any]) -> None:
        self.state, self.info = "ready", info
        self._metrics.engine_ready.set(1)
        self._settled.set()
        logger.info("the engine is ready", extra=info)

    # media

    def _want(self, digest: bytes, worker: WorkerProcess) -> None:
        """Every wish is answered, also when the request that brought the media has gone: the worker asks but once."""
        if digest in self._decoding:
            return
        media = self._brought(digest)
        if media is None:
            worker.send(MediaFailed(digest=digest, message="the request that brought this media has gone"))
            return
        task = self._decoding[digest] = asyncio.create_task(self._supply(media, worker))
        task.add_done_callback(lambda done: self._decoded(digest, done))

    def _brought(self, digest: bytes) -> EncodedMedia | None:
        """By any of the requests, at hand if it may be: a stored one can be deleted."""
        brought = [stream.media[digest] for stream in self._streams.values() if digest in stream.media]
        return max(brought, key=lambda media: media.is_at_hand, default=None)

    def _decoded(self, digest: bytes, done: asyncio.Task[None]) -> None:
        # a worker's next life may be decoding the same media again
        if self._decoding.get(digest) is done:
            del self._decoding[digest]

    async def _supply(self, media: EncodedMedia, worker: WorkerProcess) -> None:
        started = time.monotonic()
        try:
            frames = await self._decode(media)
            _check_size(frames, media)
        except ServerError as error:  # it is no picture, or was deleted since
            self._fail_media(media.digest, error, worker)
        except Exception:
            logger.exception("a media could not be decoded")
            self._fail_media(media.digest, InvalidMedia("decoding failed"), worker)
        else:
            self._metrics.media_decode.observe(time.monotonic() - started)
            worker.send(MediaPixels(digest=media.digest, shape=frames.shape, data=frames.data))

    async def _decode(self, media: EncodedMedia) -> Frames:
        try:
            return await self._decoder.decode(media)
        except MediaNotFound:
            other = self._brought(media.digest)  # perhaps by a request that came meanwhile
            if other is None or not other.is_at_hand:
                raise
            return await self._decoder.decode(other)

    def _fail_media(self, digest: bytes, error: ServerError, worker: WorkerProcess) -> None:
        self._metrics.media_decode_failures.inc()
        for stream in self._streams.values():
            if digest in stream.media:
                stream.media_error = type(error)(error.message, param=stream.media[digest].param)
        worker.send(MediaFailed(digest=digest, message=error.message))


def _vectors(embedded: Embedded) -> NDArray[np.float32]:
    return np.frombuffer(embedded.data, np.float32).reshape(embedded.shape)


def _check_size(frames: Frames, media: EncodedMedia) -> None:
    limit = MAX_MESSAGE_BYTES - 2**16
    if len(frames.data) > limit:
        raise InvalidMedia(f"{len(frames.data)} bytes of frames, the limit is {limit}", param=media.param)
