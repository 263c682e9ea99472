"""The HTTP application: routes, the guard in front of them, and one shape for all errors.

Its dependencies are arguments, so tests can pass the client of a fake engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import msgspec
from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Lifespan, Message, Receive, Scope, Send

from server.access.keys import Keys
from server.access.pages import cors_options
from server.access.tenants import DEFAULT_TENANT
from server.api.body import check_parameters
from server.api.guard import Guard, authorise
from server.api.openapi import openapi_document, operation_id
from server.api.paths import quoted_path, without_slash
from server.api.responses import IS_HEAD, JSON, JSONResponse, WholeResponse
from server.api.routes import (
    archives,
    candidates,
    chat,
    completions,
    curation,
    decisions,
    docs,
    evaluations,
    health,
    images,
    models,
    playground,
    support_sets,
)
from server.api.routes import (
    keys as key_routes,
)
from server.api.services import Services, count_failure
from server.api.tenants import Tenants
from server.api.unknown_routes import no_route
from server.concurrency import cancel
from server.engine_client.client import EngineClient
from server.errors import InvalidRequest, ServerError
from server.fewshot.comparison import Comparison
from server.fewshot.fits import FitStore
from server.fewshot.maintenance import Maintenance, WarmSets
from server.fewshot.retrieval import EmbeddingStore, Retrieval
from server.fewshot.shots import ShotSource
from server.fewshot.warming import MAX_BATCHES, MAX_UNFINISHED, Warming
from server.limits.admission import Admission
from server.limits.background import Background
from server.limits.shared_limit import SharedLimit
from server.media.fetch import Fetcher
from server.media.intake import Intake
from server.media.pool import DecodePool
from server.media.store import MediaStore
from server.quality.curation import Curation
from server.quality.evaluation_runner import EvaluationRunner
from server.quality.evaluation_store import Evaluations
from server.quality.leave_one_out import LeaveOneOut
from server.quality.recommendations import Recommendations
from server.served_model import ServedModel
from server.settings import Settings
from server.store.database import Database
from server.store.media_references import MediaReferences
from server.store.support_sets import SupportSets
from server.telemetry.metrics import Metrics
from server.telemetry.stages import noting
from server.version import VERSION
from server.weights import Weights

# the status that proxies log when a client has disconnected; it is never sent
CLIENT_CLOSED_REQUEST = 499

# statuses of the web framework's errors if it finds no route
NO_ROUTE = (404, 405)
TITLE = "Flamboyance"
ROUTERS = (
    completions.router,
    chat.router,
    images.router,
    models.router,
    candidates.router,
    decisions.router,
    evaluations.router,
    support_sets.router,
    curation.router,
    archives.router,
    key_routes.router,
    health.router,
    docs.router,
    playground.router,
)
ROUTES = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]

logger = logging.getLogger(__name__)


class Application(FastAPI):
    """FastAPI with this server's document at /openapi.json, and without FastAPI's pages, which load external scripts.

    A request with the method HEAD is answered as with GET, without the body. A path may end with a slash: a redirect would
    name the scheme and host that this server sees, which a proxy may have changed, and not all clients follow one.
    """

    def __init__(self, lifespan: Lifespan[Application]) -> None:
        super().__init__(
            title=TITLE,
            version=VERSION,
            openapi_url=None,  # FastAPI would write the document again for each request
            docs_url=None,
            redoc_url=None,
            generate_unique_id_function=operation_id,
            redirect_slashes=False,
            lifespan=lifespan,
        )
        self.add_route("/openapi.json", self._show_document, include_in_schema=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": without_slash(scope["path"])}
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await super().__call__(scope, receive, send)
            return

        async def send_empty(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await super().__call__({**scope, "method": "GET", IS_HEAD: True}, receive, send_empty)

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = openapi_document(self.routes, self.title, self.version)
        return self.openapi_schema

    @cached_property
    def document(self) -> bytes:
        """The OpenAPI document, which is written once: that takes the event loop some milliseconds."""
        return msgspec.json.encode(self.openapi())

    async def _show_document(self, request: Request) -> Response:
        return WholeResponse(self.document, media_type=JSON)


def create_app(
    engine: EngineClient,
    model: ServedModel,
    settings: Settings,
    metrics: Metrics,
    decoder: DecodePool | None = None,
    catalog: Mapping[str, ServedModel] | None = None,
) -> FastAPI:
    """Create the application of a model.

    `decoder`: the decode pool of `engine`, which the application shares; None: a new one. `catalog`: the models at the same
    address, by name; it may change. None: only this model.
    """
    decoder = decoder or DecodePool(model.config.vision, settings)
    services = _create_services(engine, model, settings, metrics, decoder, catalog)
    tenants = Tenants(services)
    runner = EvaluationRunner(
        services.evaluations,
        partial(_leave_one_out, tenants),
        metrics,
        Background(services.admission),
        settings.evaluation_queries,
    )
    maintenance = Maintenance(
        services.support_sets,
        (services.support_sets.sweep, services.retrieval.embeddings.sweep, services.comparison.fits.sweep),
        tenants.warm_sets,
        engine,
        metrics,
        sweep_interval=settings.sweep_interval,
    )
    app = Application(lifespan=partial(_lifespan, tenants=tenants, runner=runner, maintenance=maintenance))
    app.state.services, app.state.tenants = services, tenants
    for router in ROUTERS:
        app.include_router(router, dependencies=[Depends(authorise), Depends(check_parameters)])
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(ClientDisconnect, _client_disconnected)
    app.add_exception_handler(Exception, _report_bug)
    app.add_middleware(Guard, admission=services.admission, refuse=_refuse, keys=services.keys, settings=settings)
    if settings.cors_origins is not None:
        app.add_middleware(CORSMiddleware, **cors_options(settings.cors_origins))
    return app


def _create_services(
    engine: EngineClient,
    model: ServedModel,
    settings: Settings,
    metrics: Metrics,
    decoder: DecodePool,
    catalog: Mapping[str, ServedModel] | None,
) -> Services:
    """Create the services of the default tenant, from which those of other tenants are derived."""
    media_store = MediaStore(settings.media_store_url)
    database = Database(settings.database_url, settings.database_setting)
    media_references = MediaReferences(database, media_store, decoder)
    support_sets = SupportSets(database, media_references, max_examples=settings.max_set_examples)
    observe_fetch = noting("media.fetch", metrics.media_fetch.observe)
    intake = Intake(settings, media_store, decoder, Fetcher(settings, observe=observe_fetch))
    observe_retrieval = noting("retrieval", metrics.retrieval.observe)
    retrieval = Retrieval(engine, model, EmbeddingStore(database), media_store, observe=observe_retrieval)
    shots, comparison = ShotSource(intake, support_sets, retrieval), Comparison(retrieval, FitStore(database))
    slots = SharedLimit(MAX_UNFINISHED, settings.max_client_share, "requests to warm that may be unfinished")
    warming = Warming(comparison, slots, asyncio.Semaphore(MAX_BATCHES))
    evaluations = Evaluations(database, None if catalog is None else model.name, max_share=settings.max_client_share)
    return Services(
        settings=settings,
        model=model,
        catalog={model.name: model} if catalog is None else catalog,
        engine=engine,
        admission=_create_admission(settings, metrics),
        metrics=metrics,
        media_store=media_store,
        intake=intake,
        decoder=decoder,
        database=database,
        keys=Keys(database),
        retrieval=retrieval,
        media_references=media_references,
        support_sets=support_sets,
        shots=shots,
        comparison=comparison,
        warming=warming,
        warm_sets=WarmSets(support_sets, warming),
        evaluations=evaluations,
        recommendations=Recommendations(evaluations),
        curation=Curation(retrieval, comparison.recent),
        weights=Weights(None if settings.model is None else Path(settings.model)),
    )


def _create_admission(settings: Settings, metrics: Metrics) -> Admission:
    return Admission(
        settings.max_num_queued,
        metrics,
        max_bytes=settings.max_bodies_mb * 2**20,
        max_share=settings.max_client_share,
        max_held=settings.max_connections // 4,
    )


@asynccontextmanager
async def _lifespan(
    app: Application, tenants: Tenants, runner: EvaluationRunner, maintenance: Maintenance
) -> AsyncIterator[None]:
    services = tenants.of(DEFAULT_TENANT)
    await asyncio.to_thread(lambda: app.document)  # built once, and not while requests run
    await asyncio.to_thread(services.media_store.prepare)
    async with AsyncExitStack() as stopping:  # stops services in reverse order, whatever fails
        stopping.callback(services.database.close)
        await services.database.prepare()
        await services.keys.exist()  # reads the keys: from now on, requests work without the database
        stopping.push_async_callback(services.decoder.stop)
        stopping.push_async_callback(services.engine.stop)
        await services.engine.start()
        stopping.push_async_callback(_stop_warming, tenants)
        stopping.push_async_callback(runner.stop)
        await runner.start()
        stopping.push_async_callback(cancel, [asyncio.create_task(maintenance.run())])
        digesting = services.weights.compute(lambda: services.engine.state == "ready")
        stopping.push_async_callback(cancel, [asyncio.create_task(digesting)])
        stopping.callback(services.database.end_soon)
        yield


def _leave_one_out(tenants: Tenants, tenant: str) -> LeaveOneOut:
    services = tenants.of(tenant)
    return LeaveOneOut(services.shots, services.comparison, services.engine, services.model, services.metrics)


async def _stop_warming(tenants: Tenants) -> None:
    for services in tenants.known():
        await services.warming.stop()


async def _refuse(request: Request, error: ServerError) -> Response:
    count_failure(request, error)
    logger.info(
        "request refused",
        extra={
            "request_id": request.state.request_id,
            "path": quoted_path(request.scope),
            "status": error.status,
            "code": error.code,
            "param": error.param,
        },
    )
    return JSONResponse(error.body(), error.status, error.headers())


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code in NO_ROUTE:
        return await _refuse(request, no_route(request.method, request.scope["path"], ROUTES))
    return await _refuse(request, InvalidRequest(f"{request.method} {quoted_path(request.scope)}: {error.detail}"))


async def _client_disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _report_bug(request: Request, error: Exception) -> Response:
    """Return an internal error; the details of a bug are only logged. Starlette sends it without passing the guard.

    The server then closes the connection.
    """
    request_id = request.state.request_id
    logger.error("request failed", exc_info=error, extra={"request_id": request_id})
    bug = ServerError("internal error")
    count_failure(request, bug)
    return JSONResponse(bug.body(), bug.status, bug.headers() | {"X-Request-Id": request_id, "Connection": "close"})
