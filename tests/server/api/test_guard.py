"""The guard checks the API key, every response has a request id, and some refusals are held."""

from __future__ import annotations

import asyncio
import gzip
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.access.keys import Keys
from server.api.guard import OPEN_PATHS, SINGLE_HEADERS, Guard, is_health
from server.errors import ClientOverShare, ServerError
from server.limits.admission import Admission
from server.limits.pacing import MAX_PAUSE
from server.settings import Settings
from server.store.database import Database
from server.telemetry.metrics import Metrics
from tests.server.fakes import eventually

pytestmark = pytest.mark.anyio
KEY = "correct horse"
PROTECTED_PATHS = [
    "/health",
    "/health/progress",
    "/version",
    "/v1/models",
    "/v1/models/tiny",
    "/docs/docs.html",
    "/openapi.yaml",
    "/redoc",
    "/nowhere",
]


async def test_a_compressed_body_is_refused_by_its_header(http: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    response = await http.post("/tokenize", content=gzip.compress(b'{"prompt": "x"}'), headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (415, "Content-Encoding")
    identity = {"Content-Encoding": "identity"}
    assert (await http.post("/tokenize", json={"prompt": "x"}, headers=identity)).status_code == 200


class TestWithKey:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(api_key=KEY)

    @pytest.mark.parametrize("path", PROTECTED_PATHS)
    @pytest.mark.parametrize("header", [None, "Bearer wrong", f"Basic {KEY}", KEY, "Bearer", f"Bearer {KEY}x"])
    async def test_a_wrong_or_missing_key_is_refused(
        self, http: httpx.AsyncClient, path: str, header: str | None
    ) -> None:
        response = await http.get(path, headers={} if header is None else {"Authorization": header})
        assert response.status_code == 401
        error = response.json()["error"]
        assert error["code"] == "invalid_api_key"
        assert error["message"].startswith("an API key is needed" if header is None else "the API key is not valid")
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]

    async def test_a_body_is_not_read_without_the_key(self, http: httpx.AsyncClient) -> None:
        assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 401

    @pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
    async def test_the_key_is_accepted(self, http: httpx.AsyncClient, scheme: str) -> None:
        headers = {"Authorization": f"{scheme} {KEY}"}
        assert (await http.get("/v1/models", headers=headers)).status_code == 200
        assert (await http.post("/v1/completions", json={"prompt": "x"}, headers=headers)).status_code == 200

    @pytest.mark.parametrize("path", sorted(OPEN_PATHS))
    async def test_probes_and_documentation_need_no_key(self, http: httpx.AsyncClient, path: str) -> None:
        assert (await http.get(path, follow_redirects=True)).status_code == 200


async def test_without_a_configured_key_all_requests_are_accepted(http: httpx.AsyncClient, app: FastAPI) -> None:
    assert (await http.get("/v1/models", headers={"Authorization": "Bearer anything"})).status_code == 200


@pytest.mark.parametrize(("sent", "is_kept"), [("abc-1.2:3", True), ("a b", False), ("x" * 129, False), ("", False)])
async def test_only_a_valid_request_id_is_kept(http: httpx.AsyncClient, sent: str, is_kept: bool) -> None:
    request_id = (await http.get("/v1/models", headers={"X-Request-Id": sent})).headers["x-request-id"]
    assert (request_id == sent) == is_kept
    assert request_id


async def test_unknown_routes_and_methods_have_the_error_shape(http: httpx.AsyncClient) -> None:
    missing, wrong = await http.get("/v2/nothing"), await http.get("/v1/completions")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    head = await http.head("/v1/completions")
    assert (head.status_code, head.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("code", ["not_found", "method_not_allowed"])
async def test_unknown_routes_and_methods_are_counted_and_logged(
    http: httpx.AsyncClient, app: FastAPI, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server.app")
    for number in range(3):
        await http.get(f"/v2/nothing{number}" if code == "not_found" else "/v1/completions")
    counted = [line for line in (await http.get("/metrics")).text.splitlines() if f'_total{{code="{code}"' in line]
    assert counted == [f'flamboyance:request_refused_total{{code="{code}",model_name="tiny",tenant=""}} 3.0']
    assert [record.__dict__["code"] for record in caplog.records if record.message == "request refused"] == [code] * 3


async def test_a_query_of_more_parameters_than_any_route_has_is_refused(http: httpx.AsyncClient) -> None:
    for path in ("/v1/images", "/health/live"):
        response = await http.get(f"{path}?" + "&".join(["a=1"] * 65))
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "the query has 65 parameters, the limit is 64"
    response = await http.get("/v1/images?" + "&".join(["a=1"] * 64))
    assert response.json()["error"]["message"] == "a: set more than once"


@pytest.mark.parametrize("name", SINGLE_HEADERS)
async def test_a_header_of_two_values_is_refused(http: httpx.AsyncClient, name: str) -> None:
    response = await http.get("/v1/models", headers=[(name, "1"), (name, "2")])
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)


class Connection:
    """The messages of a request: its body in pieces, and the client's disconnection once `left` is set."""

    def __init__(self, *pieces: bytes) -> None:
        self.left = asyncio.Event()
        self.unread = list(pieces)

    async def receive(self) -> Message:
        if self.unread:
            return {"type": "http.request", "body": self.unread.pop(0), "more_body": bool(self.unread)}
        await self.left.wait()
        return {"type": "http.disconnect"}


async def over_share(scope: Scope, receive: Receive, send: Send) -> None:
    raise ClientOverShare("no")


@pytest.fixture
def keys(database: Database) -> Keys:
    return Keys(database)


@asynccontextmanager
async def refused(connection: Connection, keys: Keys) -> AsyncIterator[asyncio.Task[None]]:
    """A request of a client whose refusals have the longest pause."""

    async def refuse(request: Request, error: ServerError) -> Response:
        return Response(status_code=error.status)

    async def send(message: Message) -> None:
        pass

    admission = Admission(1, Metrics("tiny"))
    while admission.pacing.pause("10.0.0.1") < MAX_PAUSE:
        pass
    scope: Scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [],
        "client": ("10.0.0.1", 1),
    }
    task = asyncio.create_task(Guard(over_share, admission, refuse, keys, Settings())(scope, connection.receive, send))
    await eventually(lambda: len(admission.pacing._pauses) == 1)
    yield task
    admission.close()
    await task


async def test_a_refusal_that_is_held_ends_when_its_client_disconnects(keys: Keys) -> None:
    connection = Connection(b"a body", b"in two pieces")
    async with refused(connection, keys) as task:
        assert not task.done()
        connection.left.set()
        await asyncio.wait_for(task, MAX_PAUSE / 2)


async def test_a_large_body_is_not_read_while_its_refusal_is_held(keys: Keys) -> None:
    connection = Connection(*[b" " * 40_000] * 100)
    async with refused(connection, keys) as task:
        await asyncio.sleep(0)
        assert len(connection.unread) == 98
        assert not task.done()


@pytest.mark.parametrize(("tenant", "is_answered"), [("", True), ("acme", False)])
async def test_metrics_are_the_operators_also_where_no_route_answers(
    tenant: str, is_answered: bool, keys: Keys
) -> None:
    """A gateway answers `/metrics` itself, with nothing but this guard in front of it."""
    _, secret = await keys.create("x", "admin", tenant=tenant)
    answered = list[Scope]()

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        answered.append(scope)

    async def refuse(request: Request, error: ServerError) -> Response:
        assert error.code == "permission_denied"
        return Response(status_code=error.status)

    async def ignore(message: Message) -> None:
        pass

    headers = [(b"authorization", f"Bearer {secret}".encode())]
    scope: Scope = {"type": "http", "method": "GET", "path": "/metrics", "headers": headers}
    settings = Settings(guard_metrics=True)
    await Guard(answer, Admission(1, Metrics("tiny")), refuse, keys, settings)(scope, Connection().receive, ignore)
    assert bool(answered) == is_answered


def test_only_paths_below_health_are_about_health() -> None:
    assert all(map(is_health, ("/health", "/health/live", "/health/progress")))
    assert not any(map(is_health, ("/healthy", "/v1/health", "/")))


@pytest.mark.parametrize(
    ("headers", "is_routed"),
    [
        ({}, True),
        ({"content-length": "0"}, True),
        ({"content-length": "1"}, False),
        ({"transfer-encoding": "x"}, False),
    ],
)
async def test_a_full_server_does_not_route_a_request_with_a_body(
    headers: dict[str, str], is_routed: bool, keys: Keys
) -> None:
    """Routing a request to where its body would be read costs as much time as its refusal."""
    routed, codes = list[Scope](), list[str]()
    admission = Admission(1, Metrics("tiny"))
    with admission.ticket("other") as ticket:
        ticket.wait()
        scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }

        async def route(scope: Scope, receive: Receive, send: Send) -> None:
            routed.append(scope)

        async def refuse(request: Request, error: ServerError) -> Response:
            codes.append(error.code)
            return Response()

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            pass

        await Guard(route, admission, refuse, keys, Settings())(scope, receive, send)
    assert (bool(routed), codes) == (is_routed, [] if is_routed else ["overloaded"])


async def test_one_request_begins_in_an_iteration_of_the_event_loop_and_clients_take_turns(keys: Keys) -> None:
    """A client with many connections does not delay the steps of others by all of its requests together."""
    loop, iteration, begun = asyncio.get_running_loop(), 0, list[tuple[str, int]]()

    def count() -> None:
        nonlocal iteration
        iteration += 1
        if len(begun) < 21:
            loop.call_soon(count)

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        begun.append((scope["client"][0], iteration))

    async def refuse(request: Request, error: ServerError) -> Response:
        raise error

    async def send(message: Message) -> None:
        pass

    guard, connection = Guard(route, Admission(1, Metrics("tiny")), refuse, keys, Settings()), Connection()
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    scopes = [{**scope, "client": (address, 1)} for address in [*["10.0.0.1"] * 20, "10.0.0.2"]]
    count()
    async with asyncio.timeout(10):
        await asyncio.gather(*(guard(each, connection.receive, send) for each in scopes))
    assert [address for address, _ in begun[:4]] == ["10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.1"]
    assert len({number for _, number in begun}) == 21
