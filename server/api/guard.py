"""Middleware before every route: identifies the caller, gives each request an id, a ticket and a deadline, or refuses it.

A request with a body is refused here if it could not wait in the queue: routing it would double the time that a full server
spends on the refusal. The ticket is released after the last byte of the response, and before a refusal, which may have to
wait until it is sent. The middleware is pure ASGI, so streams pass through unchanged. It does not know the route: checks
that need the route are in `authorise`, a dependency of all routes.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import uuid
from collections.abc import Awaitable, Callable
from functools import partial

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access.callers import Caller, Callers
from server.access.keys import Keys
from server.access.pages import SAFE_METHODS, allowed_hosts, is_address, may_change, name_of, permitted_origins
from server.access.roles import OPERATOR_PATHS, may, needed_role
from server.api.paths import quoted_path
from server.errors import (
    ClientOverShare,
    Forbidden,
    HostRefused,
    InvalidRequest,
    OriginRefused,
    ServerError,
    ShuttingDown,
    Unauthorized,
    UnsupportedMediaType,
)
from server.limits.admission import Admission, Ticket
from server.limits.deadline import HEADER, Deadline, read_header
from server.limits.turns import Turns, client_in_turn
from server.schemas.base import ID
from server.settings import Settings

# A browser sends no key when it opens a page. The OpenAPI document and its page are the same for every server of a version:
# they contain nothing about its model, its data or its settings.
DOCS_PATHS = frozenset(
    {"/openapi.json", "/docs", "/docs/", "/docs/docs.js", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"}
)
# Probes and scrapers send no key either.
METRICS_PATH = "/metrics"
PROBE_PATHS = frozenset({"/health/live", "/health/ready"})
OPEN_PATHS = PROBE_PATHS | DOCS_PATHS | {METRICS_PATH}
IPV6_PREFIX = 64
# a client whose proxy does not send its address: a name that the proxy sends could be the id of a key
UNKNOWN_ADDRESS = "unknown"
# bytes of a refused body that are read and dropped: a disconnection can be noticed only after the body
MAX_DROPPED = 2**16
# maximum number of parameters in a query; no route has as many
MAX_PARAMETERS = 64
# headers that are read, and that a request may have once; of a repeated X-Request-Id, the first one is the request's
SINGLE_HEADERS = (HEADER, "Authorization", "Content-Encoding", "Content-Type", "Idempotency-Key")
REQUEST_ID = re.compile(ID)
SHUTTING_DOWN = "the server is shutting down"

logger = logging.getLogger(__name__)


class Guard:
    """Refuses requests without a valid key, and gives the others a caller, an id, a deadline and a ticket.

    `refuse` creates the response to a request that ends with a `ServerError`, here or in a route.
    """

    def __init__(
        self,
        app: ASGIApp,
        admission: Admission,
        refuse: Callable[[Request, ServerError], Awaitable[Response]],
        keys: Keys,
        settings: Settings,
    ) -> None:
        self._app = app
        self._admission = admission
        self._refuse = refuse
        api_key = None if settings.api_key is None else settings.api_key.get_secret_value()
        self._callers = Callers(keys, api_key, require_key=settings.require_key)
        self._timeout = settings.request_timeout
        self._open_paths = OPEN_PATHS - {METRICS_PATH} if settings.guard_metrics else OPEN_PATHS
        self._hosts, self._origins = allowed_hosts(settings), permitted_origins(settings)
        # At most one request begins in an iteration of the event loop. Otherwise each step of any request would wait for
        # the beginnings of all that have arrived, such as hundreds that are refused.
        self._starts = Turns(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, headers, state = scope["path"], Headers(scope=scope), scope.setdefault("state", {})
        state["request_id"] = request_id = _request_id(headers)
        client = address = _address(scope)
        has_begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                _log_management(scope, message["status"])
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            client_in_turn.set(address)
            await self._starts.wait()
            self._check_form(scope, headers)
            state["caller"] = caller = await self._identify(path, headers, address)
            client = caller.client
            self._check_caller(path, caller)
            state["deadline"] = deadline = Deadline(self._timeout)
            deadline.shorten(read_header(headers.get(HEADER)))
            with self._admission.ticket(client) as ticket:
                state["ticket"] = ticket
                client_in_turn.set(client)
                self._check_ticket(path, headers, ticket)
                async with deadline.limit():
                    await self._app(scope, receive, send_with_id)
            return
        except ServerError as error:
            if has_begun:
                raise
            refusal = error.with_traceback(None)  # the frames of the traceback hold the body
        except asyncio.CancelledError:
            if not self._admission.is_closed:
                raise
            if has_begun:
                return
            refusal = ShuttingDown(SHUTTING_DOWN)  # its time is up
        if isinstance(refusal, ClientOverShare):
            await self._admission.pacing.hold(client, partial(_disconnected, receive))
        response = await self._refuse(Request(scope), refusal)
        await response(scope, receive, send_with_id)

    def _check_form(self, scope: Scope, headers: Headers) -> None:
        """Check what does not depend on the caller. Raises what the single checks raise."""
        _check_query(scope.get("query_string", b""))
        _check_repeated(headers)
        _check_body(scope["method"], headers)
        self._check_host(scope["path"], headers)
        self._check_page(scope["method"], headers)

    def _check_caller(self, path: str, caller: Caller) -> None:
        """Check that the caller may send a request now, and count it. Raises what the single checks raise."""
        _check_tenant(path, caller)
        self._check_shutdown(path)
        if caller.quota is not None and not is_health(path):
            caller.quota.begin()

    def _check_ticket(self, path: str, headers: Headers, ticket: Ticket) -> None:
        """Check that the client may send this request next to its others. Raises what `Ticket.check` raises."""
        has_body = _has_body(headers)
        if has_body or not (self._is_open(path) or is_health(path)):
            ticket.check(waits=has_body)

    def _check_host(self, path: str, headers: Headers) -> None:
        """Refuse a request whose host is not a name of this server (DNS rebinding). Raises `HostRefused`."""
        name = name_of(headers.get("host", ""))  # every browser sends a host
        if self._hosts is None or not name or name in self._hosts or path in PROBE_PATHS:
            return
        # a scraper may address each server of a cluster by its IP address, to which no site can make its name resolve
        if path != METRICS_PATH or not is_address(name):
            raise HostRefused(
                f"the host {name[:128]!r} is not a name of this server: its operator can add it to allowed_hosts"
            )

    def _check_page(self, method: str, headers: Headers) -> None:
        """Refuse a request from a page of another site that could change something. Raises `OriginRefused`."""
        if method not in SAFE_METHODS and not may_change(headers, self._origins):
            origin = headers.get("origin", "")[:128]
            pages = f"pages of {origin!r}" if origin else "pages of another site"
            raise OriginRefused(f"{pages} may not send this request: the operator can add the origin to cors_origins")

    def _check_shutdown(self, path: str) -> None:
        """Refuse a new request after the signal, unless it is about the server's state. Raises `ShuttingDown`."""
        if self._admission.is_closed and not (self._is_open(path) or is_health(path) or path == METRICS_PATH):
            raise ShuttingDown(SHUTTING_DOWN)

    def _is_open(self, path: str) -> bool:
        return path in self._open_paths or is_playground(path)

    async def _identify(self, path: str, headers: Headers, address: str) -> Caller:
        """Return the caller, an anonymous one for open paths. Raises `Unauthorized` and `DatabaseUnavailable`."""
        if self._is_open(path):
            return Caller(client=address, role="inference")
        authorization = headers.get("authorization", "")
        caller = await self._callers.identify(authorization, address)
        if caller is None:
            fault = "the API key is not valid" if authorization else "an API key is needed"
            raise Unauthorized(f"{fault}; send a valid one in the header 'Authorization: Bearer KEY'")
        return caller


async def authorise(request: Request) -> None:
    """Refuse a request whose route the caller's role does not permit. Raises `Forbidden`."""
    caller: Caller = request.state.caller
    path: str = request.scope["route"].path
    needed = needed_role(request.method, path)
    if not may(caller.role, needed):
        raise Forbidden(f"{request.method} {path} needs a key with the role {needed}, this one has {caller.role}")
    request.state.is_management = needed == "manage"


def _check_tenant(path: str, caller: Caller) -> None:
    """Refuse paths about all tenants to other tenants, here because a gateway has no routes. Raises `Forbidden`."""
    if caller.tenant and path in OPERATOR_PATHS:
        raise Forbidden(f"{path} is about all tenants: it needs a key of the default tenant")


def _check_query(query: bytes) -> None:
    """Refuse a query that takes long to parse. Raises `InvalidRequest`."""
    if (number := query.count(b"&") + 1) > MAX_PARAMETERS:
        raise InvalidRequest(f"the query has {number} parameters, the limit is {MAX_PARAMETERS}")


def _check_repeated(headers: Headers) -> None:
    """Refuse a header that has two values where this server reads one. Raises `InvalidRequest`."""
    for name in SINGLE_HEADERS:
        if len(headers.getlist(name)) > 1:
            raise InvalidRequest(f"the header {name} is sent more than once", param=name)


def _check_body(method: str, headers: Headers) -> None:
    """Check that a body is permitted, ends unambiguously and is not compressed.

    Raises `InvalidRequest` and `UnsupportedMediaType`.
    """
    if method == "DELETE" and _has_body(headers):
        raise InvalidRequest("a DELETE request may not have a body: its fields are parameters of the query")
    if "content-length" in headers and "transfer-encoding" in headers:
        raise InvalidRequest("a body has Content-Length or Transfer-Encoding, not both", param="Content-Length")
    if (encoding := headers.get("content-encoding", "identity").lower()) != "identity" and _has_body(headers):
        message = f"a body with the encoding {encoding[:64]!r}: send it uncompressed"
        raise UnsupportedMediaType(message, param="Content-Encoding")


def _log_management(scope: Scope, status: int) -> None:
    """Log who manages what, also if the response is an error: a change may be stored before its client disconnects.

    A change of keys is logged with the key's own id.
    """
    state = scope["state"]
    if state.get("is_management"):
        caller: Caller = state["caller"]
        request = {"request_id": state["request_id"], "method": scope["method"], "path": quoted_path(scope)}
        by = {"tenant": caller.tenant or None, "by": caller.key or None}
        logger.info("management request", extra={**request, "status": status, **by})


def is_health(path: str) -> bool:
    """Return whether a path reports the state of the server, which a used-up limit of a key must not affect."""
    return path == "/health" or path.startswith("/health/")


def takes_any_query(path: str) -> bool:
    """Return whether probes, scrapers and browsers may add parameters that this server does not know to a path."""
    return path in OPEN_PATHS or is_health(path) or is_playground(path)


def is_playground(path: str) -> bool:
    """Return whether a path is a file of the playground, which is open; its requests to the API need a key."""
    return path in ("/", "/playground") or path.startswith("/playground/")


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _request_id(headers: Headers) -> str:
    """Return the client's request id if it is safe in a log line and a header, or a new one."""
    request_id = headers.get("x-request-id", "")
    return request_id if REQUEST_ID.fullmatch(request_id) else uuid.uuid4().hex


def _address(scope: Scope) -> str:
    """Return the name of a client without a key: its IPv4 address, or the IPv6 network that a single customer has."""
    host = (scope.get("client") or ("",))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return UNKNOWN_ADDRESS
    if isinstance(address, ipaddress.IPv4Address):
        return host
    network = ipaddress.ip_network((int(address), IPV6_PREFIX), strict=False)
    return str(address.ipv4_mapped or network)


async def _disconnected(receive: Receive) -> None:
    """Return when the client of a refused request has disconnected.

    A disconnection is noticed only after the body. A large body is not read to its end, and then this does not return.
    """
    size = 0
    while size <= MAX_DROPPED:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message.get("body", b""))
    await asyncio.get_running_loop().create_future()
