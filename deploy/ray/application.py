"""Runs the server's application of one model in this process, with its own engine, called without a socket.

A replica has one for each of its models. It does not need Ray, so it can be tested and used alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack

from fastapi import FastAPI
from starlette.types import Message

from deploy.ray.call import Call
from server.api.services import Services
from server.engine_client.client import WorkerClient
from server.engine_client.spare import Spare
from server.served_model import ServedModel
from server.serving import assemble, drain
from server.settings import Settings
from server.wire import ENGINE_FACTORY

# seconds for handlers of requests whose client has disconnected, after all others have ended
LAST_HANDLERS_SECONDS = 2.0

logger = logging.getLogger(__name__)


class Application:
    """A running application. Create it with `start`; `stop` drains its requests."""

    def __init__(self, app: FastAPI, engine: WorkerClient, stack: AsyncExitStack) -> None:
        self._app = app
        self._services: Services = app.state.services
        self._engine = engine
        self._stack = stack
        self._handlers: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(
        cls, settings: Settings, catalog: Mapping[str, ServedModel], factory: str = ENGINE_FACTORY
    ) -> Application:
        """Start an application and wait until its engine is ready. Raises `SettingsError`, and what the engine raises."""
        async with AsyncExitStack() as stack:
            spare = Spare(factory, settings.max_restart_delay)
            stack.push_async_callback(spare.aclose)
            spare.prepare()
            app, engine = await assemble(settings, spare, catalog)
            await stack.enter_async_context(app.router.lifespan_context(app))
            await engine.loaded()
            return cls(app, engine, stack.pop_all())

    @property
    def engine_state(self) -> str:
        return self._engine.state

    async def metrics(self) -> bytes:
        """Return the metrics in the text format of Prometheus, which a thread writes."""
        return await self._services.expose_metrics()

    async def answer(self, call: Call) -> AsyncGenerator[list[Message], None]:
        """Yield the messages of the answer, available ones together; if closed early, the client has disconnected."""
        exchange = _Exchange(call)
        handler = asyncio.create_task(self._handle(exchange))
        self._handlers.add(handler)
        handler.add_done_callback(self._handlers.discard)
        try:
            while messages := await exchange.next():
                yield messages
            await handler
        finally:
            exchange.has_client_gone.set()

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, and let running ones finish for `timeout` seconds; then they fail."""
        await drain(self._services.admission, self._engine, timeout)

    async def stop(self) -> None:
        """Refuse new requests, wait for running ones as long as the server would, and end the engine."""
        await self.drain(self._services.settings.shutdown_timeout)
        if self._handlers:
            await asyncio.wait(self._handlers, timeout=LAST_HANDLERS_SECONDS)
        await self._stack.aclose()

    async def _handle(self, exchange: _Exchange) -> None:
        try:
            await self._app(exchange.call.scope(), exchange.receive, exchange.send)
        finally:
            exchange.end()


class _Exchange:
    """The two ends of one request: the application receives and sends, and the caller takes what was sent."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.has_client_gone = asyncio.Event()
        self._is_body_received = False
        self._sent: list[Message] = []
        self._is_ended = False
        self._news = asyncio.Event()

    async def receive(self) -> Message:
        if not self._is_body_received:
            self._is_body_received = True
            return {"type": "http.request", "body": self.call.body, "more_body": False}
        await self.has_client_gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self._sent.append(message)
        self._news.set()

    def end(self) -> None:
        self._is_ended = True
        self._news.set()

    async def next(self) -> list[Message]:
        """Return the messages since the last call, as soon as there is one; none at the end."""
        while not self._sent and not self._is_ended:
            self._news.clear()
            await self._news.wait()
        messages, self._sent = self._sent, []
        return messages
