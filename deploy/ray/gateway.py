"""The gateway: reads a request, finds its routing key and model, and sends it to a replica, or to another one if that dies.

It has the server's own limits on clients and bodies (`server/api/guard.py`), and holds no state: any number of gateways can
serve one address. It answers requests about the whole fleet itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, TypeAlias

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.ray.affinity import affinity_key
from deploy.ray.call import Call, Routing
from deploy.ray.exposition import labelled, merge
from deploy.ray.replay import MAX_ATTEMPTS, REFUSALS, ReplicaLost, lost, may_repeat, with_key
from deploy.ray.replica import REPLICA_HEADER
from server.access.callers import Caller
from server.access.keys import Keys
from server.access.pages import cors_options
from server.access.tenants import DEFAULT_TENANT, qualified
from server.api.body import LARGE_BODY, content_type, read_body
from server.api.guard import Guard
from server.api.paths import without_slash
from server.api.responses import JSON, PIECE, JSONResponse
from server.api.sse import DONE, EventStream, event, unless_disconnected
from server.errors import Overloaded, ServerError
from server.limits.admission import Admission, Ticket
from server.limits.deadline import MAX_SECONDS
from server.schemas.separators import MAX_SEPARATORS, check_separators
from server.settings import Settings
from server.store.database import Database
from server.telemetry import logs
from server.telemetry.metrics import CONTENT_TYPE, PREFIX, Metrics

IMPORT_PATH = "/v1/support_sets/import"
# seconds in which replicas must answer requests about the fleet
FLEET_SECONDS = 5.0
SILENT_HELP = "Replicas and gateways that did not answer this scrape"
RETRY_AFTER = 1
# bytes of a response that count as unread; an archive may have gigabytes
MAX_UNREAD = 64 * 2**20

Answer: TypeAlias = "DeploymentResponseGenerator[list[Message]]"

logger = logging.getLogger(__name__)


class Gateway:
    """The deployment of gateways, in front of the deployment of replicas.

    `max_waiting` in its configuration: maximum requests of one gateway without an answer yet. It does not know which of
    them a replica runs.
    """

    def __init__(self, replicas: DeploymentHandle[Any], settings: Settings) -> None:
        logs.configure(settings.log_level, settings.log_format)
        self._replicas = replicas
        self._settings = settings
        # an archive may be larger than other bodies, and has proportionally more time to arrive
        ratio = max(settings.max_import_mb / settings.max_body_mb, 1)
        timeout = ratio * settings.body_timeout
        self._import_settings = settings.model_copy(
            update={"max_body_mb": settings.max_import_mb, "body_timeout": timeout}
        )
        self._admission = Admission(
            0,
            Metrics("gateway"),
            max_bytes=settings.max_bodies_mb * 2**20,
            max_share=settings.max_client_share,
            max_held=settings.max_connections // 4,
        )
        self._models: list[str] = []
        self._routing: Routing = "affinity"
        self._handles: dict[str, Any] = {}  # they return an `Answer`
        self._registry = CollectorRegistry()
        # the name of a server's counter: what a gateway refuses reaches no server
        self._refused = Counter(
            PREFIX + "request_refused",
            "Requests that failed, by error code and tenant",
            ["model_name", "code", "tenant"],
            registry=self._registry,
        )

    def reconfigure(self, config: dict[str, Any]) -> None:
        self._models, self._routing = config["models"], config["routing"]
        self._admission.queue.total = config["max_waiting"]
        options = partial(self._replicas.options, stream=True, method_name="answer")
        self._handles = {name: options(multiplexed_model_id=name) for name in self._models}

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application that Ray serves, with the guard of a server in front of it."""
        settings = self._settings
        keys = Keys(Database(settings.database_url, settings.database_setting))
        app: ASGIApp = Guard(self._serve, self._admission, self._refuse, keys, settings)
        if settings.cors_origins is not None:
            app = CORSMiddleware(app, **cors_options(settings.cors_origins))
        return _HTTPOnly(app)

    async def http_address(self) -> tuple[str, int]:
        """Return the host and the port of the fleet's proxy, which an update cannot change."""
        return self._settings.host, self._settings.port

    async def drain(self) -> int:
        """Refuse new requests, and return the number of those that have not ended."""
        self._admission.close()
        return self._admission.num_unfinished

    async def metrics(self) -> bytes:
        """Return the gateway's own metrics in the text format of Prometheus, with its name."""
        return labelled(generate_latest(self._registry), serve.get_replica_context().replica_id.unique_id)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        match scope["path"], scope["method"]:
            case "/health/live", "GET" | "HEAD":
                response: Response = JSONResponse({"status": "live"})
            case "/health/ready", "GET" | "HEAD":
                response = await self._ready()
            case "/metrics", "GET" | "HEAD":
                response = Response(await self._metrics_of_all(), media_type=CONTENT_TYPE)
            case _:
                await self._forward(request, send)
                return
        await response(scope, receive, send)

    async def _ready(self) -> Response:
        """Respond as a server does: the fleet is ready if a replica is. The first one that is decides, whatever hangs."""
        if self._admission.is_closed:
            return JSONResponse({"status": "shutting_down"}, 503)
        status = "starting"
        for answer in asyncio.as_completed(await _ask(self._replicas, "readiness")):
            status = await answer or status
            if status == "ready":
                return JSONResponse({"status": status})
        return JSONResponse({"status": status}, 503)

    async def _metrics_of_all(self) -> bytes:
        """Return the metrics of the replicas and gateways that respond, and the number of those that do not."""
        calls = await asyncio.gather(_ask(self._replicas, "metrics"), _ask(self._gateways, "metrics"))
        answers = await asyncio.gather(*chain(*calls))
        registry = CollectorRegistry()
        silent = Gauge(PREFIX + "replicas_silent", SILENT_HELP, registry=registry)
        # a replica of another version may return another type
        texts = [answer for answer in answers if isinstance(answer, bytes)]
        silent.set(len(answers) - len(texts))
        return merge(texts) + generate_latest(registry)

    @cached_property
    def _gateways(self) -> DeploymentHandle[Any]:
        """All gateways. Each handle has a router of its own, so there is one for all scrapes."""
        context = serve.get_replica_context()
        return serve.get_deployment_handle(context.deployment, context.app_name)

    async def _refuse(self, request: Request, error: ServerError) -> Response:
        self._count_refused(request, error.code)
        logger.info("request refused", extra={"request_id": request.state.request_id, "code": error.code})
        return JSONResponse(error.body(), error.status, error.headers())

    def _count_refused(self, request: Request, code: str) -> None:
        # None if the request was refused before its caller was identified
        caller: Caller | None = getattr(request.state, "caller", None)
        self._refused.labels("", code, DEFAULT_TENANT if caller is None else caller.tenant).inc()

    async def _forward(self, request: Request, send: Send) -> None:
        try:
            call, model = await self._read(request)
            await unless_disconnected(request.receive, self._answer(call, model, request, send))
        except ClientDisconnect:
            logger.debug("the client has disconnected", extra={"request_id": request.state.request_id})

    async def _read(self, request: Request) -> tuple[Call, str]:
        """Return the whole request, and the name of its model. Raises what `read_body` and `_fields` raise."""
        settings = self._import_settings if request.scope["path"] == IMPORT_PATH else self._settings
        body = await read_body(request, settings)
        fields = _fields(request, body) if len(body) < LARGE_BODY else await asyncio.to_thread(_fields, request, body)
        # the replica checks a time limit in the body, but it applies already while the request waits for a replica
        request.state.deadline.shorten(_timeout(fields))
        call = with_key(Call.from_scope(request.scope, body, key=self._key(request, fields), routing=self._routing))
        named = None if fields is None else fields.get("model")
        # a model that does not exist is refused by the application of another model, which knows all names
        return call, named if isinstance(named, str) and named in self._models else self._models[0]

    def _key(self, request: Request, fields: dict[str, Any] | None) -> str | None:
        """Return the key that chooses the replica. Tenants share no sets, and pictures only if they share caches."""
        key = affinity_key(request.scope["path"], fields)
        if key is None or self._settings.share_caches:
            return key
        return qualified(request.state.caller.tenant, key)

    async def _answer(self, call: Call, model: str, request: Request, send: Send) -> None:
        """Send the answer of a replica. Raises `ServerError` if there is none, before anything is sent."""
        while True:
            answer = self._handles[model].remote(call)
            messages = await self._first(answer, call)
            is_last = call.attempt + 1 >= MAX_ATTEMPTS
            if messages is None:
                if is_last or not may_repeat(call):
                    raise lost(call)
                call = replace(call, attempt=call.attempt + 1)
            elif (replica := _refusing_replica(messages)) is not None and not is_last:
                call = replace(call, attempt=call.attempt + 1, avoid=call.avoid | {replica})
            else:
                request.state.ticket.started()
                request.state.deadline.end()
                count_lost = partial(self._count_refused, request, ReplicaLost.code)
                await _send_all(messages, answer, send, request.state.ticket, count_lost)
                return

    async def _first(self, answer: Answer, call: Call) -> list[Message] | None:
        """Return the first messages of an answer; None if its replica is lost. Raises `ServerError`."""
        try:
            async for messages in answer:
                return messages
        except RayActorError:
            logger.warning("a replica was lost", extra={"path": call.path, "attempt": call.attempt})
            return None
        except BackPressureError as error:
            message = "all replicas are busy, and too many requests wait"
            raise Overloaded(message, retry_after=RETRY_AFTER) from error
        except RayError as error:
            logger.error("a replica failed", exc_info=error, extra={"path": call.path})
        except BaseException:
            answer.cancel()
            raise
        raise ServerError("internal error")  # the application failed, or ended without an answer: a bug


async def _ask(deployment: DeploymentHandle[Any], method: str) -> list[Coroutine[Any, Any, Any]]:
    """Call a method of all replicas of a deployment, and return their answers to await, see `_answer_of`.

    If none of them can be reached, the only answer is None.
    """
    broadcast = deployment.broadcast(method)
    try:
        # Ray's public `results_async` returns all results or none: one replica that hangs would hide those of the rest
        results = await asyncio.wait_for(broadcast._fetch_replica_results_async(), FLEET_SECONDS)
    except (TimeoutError, DeploymentUnavailableError):
        return [asyncio.sleep(0)]
    return [_answer_of(result) for result in results]


async def _answer_of(result: Any) -> Any:
    """Return the answer of a replica; None if it fails, or does not answer in time."""
    try:
        return await asyncio.wait_for(result.get_async(), FLEET_SECONDS)
    except Exception:  # whatever a replica raises, the answers of the rest count
        return None


class _HTTPOnly:
    """Refuses other protocols than HTTP, and makes paths those of routes.

    It removes the header with the request's id, which Ray's proxy adds itself.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _run_lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return

        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                del headers["X-Request-Id"]
            await send(message)

        await self._app({**scope, "path": without_slash(scope["path"])}, receive, send_without_id)


async def _run_lifespan(receive: Receive, send: Send) -> None:
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})


def _fields(request: Request, body: bytes) -> dict[str, Any] | None:
    """Return the fields of a JSON body; None for any other body, which the replica checks.

    Raises `BodyTooLarge` for a body that takes too long to parse.
    """
    if content_type(request) != JSON:
        return None
    check_separators(body, MAX_SEPARATORS, "the body")
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _timeout(fields: dict[str, Any] | None) -> float | None:
    """Return the seconds that the request may take by a field of its body, None if there is no valid one."""
    match fields:
        case {"timeout": bool()}:
            return None
        case {"timeout": int() | float() as seconds} if 0 < seconds <= MAX_SECONDS:
            return seconds
    return None


def _refusing_replica(messages: list[Message]) -> str | None:
    """Return the replica that refused a request before any work, so that it can be sent to another one."""
    start, *rest = messages
    if start["status"] != 503 or not rest:
        return None
    try:
        code = msgspec.json.decode(rest[0]["body"])["error"]["code"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return None
    headers = Headers(raw=start["headers"])
    return headers.get(REPLICA_HEADER.decode()) if code in REFUSALS else None


async def _send_all(
    messages: list[Message], answer: Answer, send: Send, ticket: Ticket, count_lost: Callable[[], None]
) -> None:
    """Send the first messages and those that follow. If the replica is lost, a stream of events ends with an error."""
    headers = Headers(raw=messages[0]["headers"])
    is_stream = headers.get("content-type", "").startswith(EventStream.media_type)
    length = headers.get("content-length")
    is_complete = False
    try:
        _count_unread(_num_bytes(messages) if length is None else int(length), ticket)
        is_complete = await _send_messages(messages, send)
        async for more in answer:
            if length is None:
                _count_unread(_num_bytes(more), ticket)
            is_complete = await _send_messages(more, send)
    except RayError:
        logger.warning("a replica was lost during its answer", extra={"complete": is_complete})
        if is_complete:
            return
        count_lost()
        if not is_stream:
            raise  # the connection is closed before the announced end of the body
        error = ReplicaLost("the replica that had this request was lost")
        await send({"type": "http.response.body", "body": event(error.body()) + DONE, "more_body": False})
    except BaseException:
        # Ray reports a client as gone as soon as its answer is complete
        if not is_complete:
            answer.cancel()
        raise


async def _send_messages(messages: list[Message], send: Send) -> bool:
    """Send messages, and return whether the answer is complete."""
    for message in messages:
        await send(message)
    return messages[-1]["type"] == "http.response.body" and not messages[-1].get("more_body", False)


def _count_unread(num_bytes: int, ticket: Ticket) -> None:
    """Count bytes of a large answer as a body, because its client may not read them.

    Ray fetches an answer before its client reads it, and does not say how many bytes are unread: all of a known length
    count at once, and a request counts for at most `MAX_UNREAD`.
    """
    if num_bytes > PIECE:
        ticket.count(min(num_bytes, max(MAX_UNREAD - ticket.num_bytes, 0)))


def _num_bytes(messages: list[Message]) -> int:
    return sum(len(message.get("body", b"")) for message in messages)
