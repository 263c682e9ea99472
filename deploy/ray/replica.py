"""A replica: a process of Ray that runs the server's application for several models, up to a maximum number.

Ray keeps the last used models (`serve.multiplexed`). If the weights or settings of a model change, it is loaded again next
to the old one, and replaces it when it is ready.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from ray import serve
from starlette.types import Message

from deploy.ray.application import Application
from deploy.ray.call import Call
from deploy.ray.exposition import labelled
from server.served_model import ServedModel
from server.serving import set_up_process
from server.settings import Settings
from server.telemetry import logs
from server.wire import ENGINE_FACTORY

REPLICA_HEADER = b"x-replica"

logger = logging.getLogger(__name__)


class LoadedModel:
    """A model in a replica: its application, which `replace` changes under running requests."""

    def __init__(self, application: Application, forget: Callable[[], object]) -> None:
        self.application = application
        self._forget = forget
        self._is_closed = False
        # Ray calls and awaits this when it drops the model. It is an attribute of the object, because Python itself would
        # call a destructor in the class without awaiting it.
        self.__del__ = self.close

    async def replace(self, application: Application) -> None:
        """Send new requests to another application, and stop the old one when its requests have ended.

        If Ray has dropped the model while the other application started, that one is stopped.
        """
        if self._is_closed:
            await application.stop()
            return
        old, self.application = self.application, application
        await old.stop()

    async def close(self) -> None:
        self._is_closed = True
        self._forget()
        await self.application.stop()


class Replica:
    """The deployment of replicas; `replica_class` adds the maximum number of models."""

    def __init__(self, settings: Settings, factory: str = ENGINE_FACTORY) -> None:
        logs.configure(settings.log_level, settings.log_format)
        set_up_process()
        self._settings = settings
        self._factory = factory
        self._id = serve.get_replica_context().replica_id.unique_id
        self._configs: dict[str, Any] = {}
        self._catalog: dict[str, ServedModel] = {}
        self._loaded: dict[str, LoadedModel] = {}
        self._registry = CollectorRegistry()
        self._repeated = Counter(
            "flamboyance:requests_repeated",
            "Requests that another replica had before, which was lost or refused them",
            registry=self._registry,
        )

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Apply a configuration of models: at startup, load the first one; later, replace changed ones in memory."""
        old, self._configs = self._configs, config["models"]
        catalog = {name: ServedModel.load(self._settings_of(name)) for name in self._configs}
        self._catalog.clear()  # the applications have a view of it
        self._catalog.update(catalog)
        if not old:
            await self.load(next(iter(self._configs)))
        for name, loaded in list(self._loaded.items()):
            is_changed = name in self._configs and name in old and self._configs[name] != old[name]
            if is_changed and self._loaded.get(name) is loaded:
                await loaded.replace(await self._start(name))
                logger.info("a model was replaced", extra={"model": name})

    async def answer(self, call: Call) -> AsyncGenerator[list[Message], None]:
        """Yield the ASGI messages of the answer, in lists."""
        if call.attempt:
            self._repeated.inc()
        # during an update, a gateway may still send a model that was removed: the first one refuses its name
        requested = serve.get_multiplexed_model_id()
        name = requested if requested in self._configs else next(iter(self._configs))
        # a client that disconnects must not stop the loading of a model, which the next client needs, too
        loaded: LoadedModel = await asyncio.shield(asyncio.ensure_future(self.load(name)))
        async with aclosing(loaded.application.answer(call)) as batches:
            async for messages in batches:
                yield [self._signed(message) for message in messages]

    async def readiness(self) -> str:
        """Return the state of the default model's engine; if others have replaced it, "ready" if one of them is."""
        states = {name: loaded.application.engine_state for name, loaded in self._loaded.items()}
        return states.get(next(iter(self._configs)), "ready" if "ready" in states.values() else "starting")

    async def metrics(self) -> bytes:
        """Return the metrics of the models and the replica's own in the text format of Prometheus, with its name."""
        texts = [await loaded.application.metrics() for loaded in list(self._loaded.values())]
        return await asyncio.to_thread(lambda: labelled(b"".join([*texts, generate_latest(self._registry)]), self._id))

    async def fail_requests(self) -> None:
        """Refuse new requests, and end running ones with an error."""
        await asyncio.gather(*(loaded.application.drain(0.0) for loaded in self._loaded.values()))

    async def check_health(self) -> None:
        """Raise if the engine of a model cannot start: Ray then replaces the replica."""
        for name, loaded in self._loaded.items():
            if loaded.application.engine_state == "failed":
                raise RuntimeError(f"the engine of {name} does not start")

    async def load(self, name: str) -> LoadedModel:
        """Return a model, from memory or started; decorated by `replica_class`."""
        raise NotImplementedError

    async def load_model(self, name: str) -> LoadedModel:
        """Start a model, and again if its configuration has changed meanwhile: `reconfigure` replaces only loaded ones."""
        config = self._configs[name]
        application = await self._start(name)
        while self._configs.get(name, config) != config:
            await application.stop()
            config = self._configs[name]
            application = await self._start(name)
        self._loaded[name] = loaded = LoadedModel(application, partial(self._loaded.pop, name))
        return loaded

    async def _start(self, name: str) -> Application:
        application = await Application.start(self._settings_of(name), self._catalog, self._factory)
        logger.info("a model is ready", extra={"model": name})
        return application

    def _settings_of(self, name: str) -> Settings:
        return self._settings.model_copy(
            update=Settings(**self._configs[name]["settings"]).model_dump(exclude_unset=True)
        )

    def _signed(self, message: Message) -> Message:
        """Return a message with the replica's name among its headers."""
        if message["type"] != "http.response.start":
            return message
        return {**message, "headers": [*message["headers"], (REPLICA_HEADER, self._id.encode())]}


def replica_class(models_per_replica: int) -> type[Replica]:
    """Return the class of replicas with this maximum number of models, which Ray reads from a decorator."""

    class Server(Replica):
        @serve.multiplexed(max_num_models_per_replica=models_per_replica)
        async def load(self, name: str) -> LoadedModel:
            return await self.load_model(name)

    return Server
