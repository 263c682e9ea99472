"""Sends requests from the API process to the worker, and returns their events and replies.

While no worker is ready, requests are refused. When a worker dies, its requests fail; a worker that hangs is killed.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from copy import copy
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from model.prompt import EncodedPrompt
from server import wire
from server.engine_client.media_supply import MediaDecoder, MediaSupply, OpenRequest
from server.engine_client.salt import (
    NO_SALT,
    SaltKind,
    add_salt,
    salted,
    salted_media,
    salted_prompt,
    salted_sources,
)
from server.engine_client.spare import Spare
from server.engine_client.supervisor import State, Supervisor
from server.engine_client.watchdog import Watchdog
from server.engine_client.worker_process import WorkerProcess
from server.errors import EngineDied, EngineNotReady, EngineStalled, ServerError
from server.limits.turns import client_in_turn
from server.media.source import EncodedMedia
from server.run_queue import RunQueue
from server.settings import Settings
from server.telemetry.metrics import Metrics

ReplyType = TypeVar("ReplyType", wire.Scored, wire.Embedded, wire.Inspected)

logger = logging.getLogger(__name__)


class EngineClient(Protocol):
    """The engine as the API process sees it."""

    @property
    def state(self) -> State: ...

    @property
    def info(self) -> dict[str, Any]: ...

    @property
    def step_age(self) -> float: ...

    @property
    def salt(self) -> bytes:
        """The salt of its requests, which share caches only with requests that have the same salt."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def fail_all(self, error: ServerError) -> None: ...

    def stream(
        self, request: wire.Generate, media: Mapping[bytes, EncodedMedia]
    ) -> AsyncGenerator[wire.Event, None]: ...

    def salted(self, kind: SaltKind, name: str) -> EngineClient:
        """Return the client of a tenant, or of requests with one `cache_salt`, which share no cache with others."""

    def end_answer(self, request_id: str, index: int) -> None:
        """Abort one of several answers; its stream still reports its end, with "abort"."""

    async def score(self, request: wire.Score, media: Mapping[bytes, EncodedMedia]) -> wire.Scored: ...

    async def inspect(self, request: wire.Inspect, media: Mapping[bytes, EncodedMedia]) -> wire.Inspected: ...

    async def embed(self, media: Sequence[EncodedMedia]) -> NDArray[np.float32]:
        """Return [M, Dv]: the frozen vision encoder's features, means over frames and patches."""

    async def embed_text(self, texts: Sequence[list[int]]) -> NDArray[np.float32]:
        """Return [N, D]: the frozen language model's last hidden states without media.

        They are means over tokens, of length one.
        """

    def pin(self, digests: Sequence[bytes], is_kept: bool, prompts: Sequence[EncodedPrompt] = ()) -> None:
        """Hint to keep media, and the shots of prompts, on the device, or to release them.

        Whether the device has room for them is not reported.
        """


class WorkerClient:
    """The engine in a worker process. The first worker and its successors are taken from `spare`."""

    def __init__(self, settings: Settings, decoder: MediaDecoder, metrics: Metrics, spare: Spare) -> None:
        self._metrics = metrics
        self._supervisor = Supervisor(settings, spare, metrics)
        self._open_requests: dict[str, OpenRequest] = {}
        self._supply = MediaSupply(decoder, metrics, settings, self._open_requests)
        self._watchdog = Watchdog(settings.stall_timeout)
        self._serving: asyncio.Task[None] | None = None
        self._salt = NO_SALT

    def salted(self, kind: SaltKind, name: str) -> WorkerClient:
        client = copy(self)
        client._salt = add_salt(self._salt, kind, name)
        return client

    @property
    def salt(self) -> bytes:
        return self._salt

    @property
    def state(self) -> State:
        return self._supervisor.state

    @property
    def info(self) -> dict[str, Any]:
        return self._supervisor.info

    @property
    def step_age(self) -> float:
        """Seconds since the worker last made progress; 0 without requests. A worker that hangs sends no messages."""
        return self._watchdog.silence if self._open_requests and self.state == "ready" else 0.0

    async def start(self) -> None:
        self._serving = asyncio.create_task(self._serve())

    async def loaded(self) -> None:
        """Return when the first worker is ready. Raises what `Supervisor.loaded` raises."""
        await self._supervisor.loaded()

    async def stop(self) -> None:
        self._supervisor.close()
        self.fail_all(EngineNotReady("the server is shutting down"))
        if self._serving is not None:
            self._serving.cancel()
            with suppress(asyncio.CancelledError):
                await self._serving
        await self._supply.stop()

    def fail_all(self, error: ServerError) -> None:
        for opened in self._open_requests.values():
            opened.events.put_nowait(error)

    async def stream(
        self, request: wire.Generate, media: Mapping[bytes, EncodedMedia]
    ) -> AsyncGenerator[wire.Event, None]:
        """Yield events until each answer has its finish reason; abort the request if closed before that."""
        with self._open(request, media) as opened:
            num_open = request.sampling.n
            while num_open:
                event = await opened.next()
                assert not isinstance(event, wire.Reply)
                if isinstance(event, wire.Token | wire.Finished) and event.finish_reason is not None:
                    num_open -= 1
                opened.is_finished = not num_open
                yield event

    def end_answer(self, request_id: str, index: int) -> None:
        if (worker := self._supervisor.worker) is not None and request_id in self._open_requests:
            worker.send(wire.Abort(request_id, index))

    async def score(self, request: wire.Score, media: Mapping[bytes, EncodedMedia]) -> wire.Scored:
        return await self._reply(request, media, wire.Scored)

    async def inspect(self, request: wire.Inspect, media: Mapping[bytes, EncodedMedia]) -> wire.Inspected:
        return await self._reply(request, media, wire.Inspected)

    async def embed(self, media: Sequence[EncodedMedia]) -> NDArray[np.float32]:
        digests = [m.digest for m in media]
        request = wire.Embed(request_id=f"embed-{uuid.uuid4().hex}", media=digests, client=client_in_turn.get())
        embedded = await self._reply(request, {m.digest: m for m in media}, wire.Embedded)
        self._metrics.count_media(embedded.media_encoded, embedded.media_cached)
        return _vectors(embedded)

    async def embed_text(self, texts: Sequence[list[int]]) -> NDArray[np.float32]:
        name, client = f"embed-{uuid.uuid4().hex}", client_in_turn.get()
        request = wire.EmbedText(request_id=name, texts=list(texts), client=client)
        return _vectors(await self._reply(request, {}, wire.Embedded))

    def pin(self, digests: Sequence[bytes], is_kept: bool, prompts: Sequence[EncodedPrompt] = ()) -> None:
        if (worker := self._supervisor.worker) is not None:
            salt = self._salt
            worker.send(
                wire.Pin(
                    digests=salted_sources(digests, salt),
                    is_kept=is_kept,
                    prompts=[salted_prompt(prompt, salt) for prompt in prompts],
                )
            )

    async def _reply(
        self, request: wire.Request, media: Mapping[bytes, EncodedMedia], kind: type[ReplyType]
    ) -> ReplyType:
        """Return the reply of a request; abort the request if cancelled before that."""
        with self._open(request, media) as opened:
            while not isinstance(event := await opened.next(), kind):
                pass
            opened.is_finished = True
            return event

    @contextmanager
    def _open(self, request: wire.Request, media: Mapping[bytes, EncodedMedia]) -> Iterator[OpenRequest]:
        worker, state = self._supervisor.worker, self._supervisor.state
        if worker is None or state != "ready":
            raise EngineNotReady(f"the model is not ready: the engine is {state}")
        if not self._open_requests:
            self._watchdog.progress()
        if self._salt:
            request, media = salted(request, self._salt), salted_media(media, self._salt)
        opened = self._open_requests[request.request_id] = OpenRequest(media)
        self._supply.begin(opened)
        try:
            worker.send(request)
            yield opened
        finally:
            del self._open_requests[request.request_id]
            self._supply.end(opened)
            if not opened.is_finished:
                worker.send(wire.Abort(request.request_id))

    async def _serve(self) -> None:
        async with aclosing(self._supervisor.workers()) as workers:
            async for worker in workers:
                watching = asyncio.create_task(self._watch(worker))
                try:
                    await worker.serve(partial(self._handle, worker))
                finally:
                    watching.cancel()
                    self._end_requests()

    async def _watch(self, worker: WorkerProcess) -> None:
        """Kill the worker once it has had work and made no progress for `stall_timeout`."""
        run_queue = RunQueue(worker.pid)
        while True:
            await asyncio.sleep(self._watchdog.interval)
            if not self._open_requests or self._supervisor.worker is not worker:
                self._watchdog.progress()
            elif self._watchdog.tick(run_queue.take_wait()):
                logger.error("the worker makes no progress", extra={"seconds": round(self._watchdog.silence, 1)})
                self._supervisor.kill(worker)
                self.fail_all(EngineStalled("the engine made no progress on its requests; it is being restarted"))
                return

    def _handle(self, worker: WorkerProcess, message: wire.Outbound) -> None:
        match message:
            case wire.Beat():
                self._watchdog.progress(message.last_step_age)
                self._metrics.engine.values = message.gauges
                self._metrics.engine.histograms |= message.histograms
            case wire.Ready():
                self._metrics.engine.info = message.info
                self._supervisor.become_ready(worker, message.info)
            case wire.StartRefused():
                self._supervisor.refuse(worker, message.message)
            case wire.MediaWanted():
                self._supply.send(message.digest, worker)
            case wire.Encoded():
                if (opened := self._open_requests.get(message.request_id)) is not None:
                    opened.stages.note("media.encode", message.seconds, frames=message.num_frames)
            case _:
                self._watchdog.progress()
                if (opened := self._open_requests.get(message.request_id)) is not None:
                    if isinstance(message, wire.Token):  # the whole prompt was computed
                        self._supply.release(opened)
                    opened.events.put_nowait(message)

    def _end_requests(self) -> None:
        """Fail the requests of a worker that is dead."""
        if self._open_requests:
            logger.error("requests failed with their worker", extra={"requests": len(self._open_requests)})
        self._metrics.engine.values = {}
        self.fail_all(EngineDied("the engine died while it worked on this request; it is being restarted"))
        self._supply.cancel()


def _vectors(embedded: wire.Embedded) -> NDArray[np.float32]:
    return np.frombuffer(embedded.data, np.float32).reshape(embedded.shape)
