"""The gateway in front of two applications in this process, in place of replicas on a cluster, with keys of tenants."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from prometheus_client import generate_latest
from starlette.types import Message

from deploy.ray.affinity import ranked
from deploy.ray.application import Application
from deploy.ray.call import Call
from server.access.quotas import Limits
from server.access.roles import Role
from server.app import create_app
from server.limits.admission import Admission
from server.settings import Settings
from server.telemetry.metrics import Metrics
from tests.server.api.test_responses import Reader, photograph
from tests.server.conftest import data_url, png
from tests.server.fakes import FakeClient, eventually, served_model

with warnings.catch_warnings():  # of Ray's own modules
    warnings.simplefilter("ignore")
    from ray.exceptions import RayActorError

    from deploy.ray import gateway
    from deploy.ray.gateway import Gateway, _ask
    from deploy.ray.replica import REPLICA_HEADER

pytestmark = pytest.mark.anyio
METRIC = b'# HELP requests_total A.\n# TYPE requests_total counter\nrequests_total{replica="%s"} 1.0\n'
SHOTS = [{"image": data_url(png("red")), "label": "red"}, {"image": data_url(png("blue")), "label": "blue"}]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Answer:
    """The messages of a replica, as the gateway gets them from Ray."""

    def __init__(self, batches: AsyncGenerator[list[Message], None]) -> None:
        self._batches = batches

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> list[Message]:
        return await anext(self._batches)

    def cancel(self) -> None:
        pass  # the task that waits for the next message is cancelled itself


class Result:
    """The answer of a replica to a call of all, as Ray returns it: none from a replica that hangs."""

    def __init__(self, replica: str, state: str, method: str) -> None:
        self._replica = replica
        self._state = state
        self._method = method

    async def get_async(self) -> Any:
        if self._state == "hung":
            await asyncio.Event().wait()
        if self._state == "lost":
            raise RayActorError
        is_text = self._method == "readiness" or self._state == "older"
        return self._state if is_text else METRIC % self._replica.encode()


class Broadcast:
    """A call of all replicas."""

    def __init__(self, results: list[Result]) -> None:
        self._results = results

    async def _fetch_replica_results_async(self) -> list[Result]:
        return self._results


class Replicas:
    """A handle of two replicas, which chooses by the key as Ray's router does. While `is_full`, none takes a request.

    While `is_cut`, each is lost after the first messages of an answer.
    """

    def __init__(self, settings: Settings, names: Iterable[str] = "ab") -> None:
        self.apps = {name: create_app(FakeClient(), served_model(), settings, Metrics("tiny")) for name in names}
        self.states: dict[str, str] = dict.fromkeys(self.apps, "ready")
        self.calls: list[Call] = []
        self.is_full = self.is_cut = False

    def options(self, **_: object) -> Replicas:
        return self

    def remote(self, call: Call) -> Answer:
        self.calls.append(call)
        return Answer(self._answer(call))

    def broadcast(self, method: str) -> Broadcast:
        return Broadcast([Result(replica, self.states[replica], method) for replica in self.apps])

    async def _answer(self, call: Call) -> AsyncGenerator[list[Message], None]:
        if self.is_full:
            await asyncio.Event().wait()
        name = ranked(call.key or str(len(self.calls)), list(self.apps))[0]
        application = Application(self.apps[name], FakeClient(), AsyncExitStack())  # type: ignore[arg-type]
        async for messages in application.answer(call):
            for message in messages:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (REPLICA_HEADER, name.encode())]
            yield messages
            if self.is_cut:
                raise RayActorError


class Fleet:
    """Two replicas, and clients of the gateway with keys of tenants."""

    def __init__(self, settings: Settings) -> None:
        self.replicas = Replicas(settings)
        gateway = Gateway(self.replicas, settings)
        gateway._gateways = Replicas(settings, names=())
        self.gateway = gateway
        self.configure(max_waiting=16)
        self.app = gateway.__serve_build_asgi_app__()
        self._clients = AsyncExitStack()

    def configure(self, max_waiting: int) -> None:
        self.gateway.reconfigure({"models": ["tiny"], "routing": "affinity", "max_waiting": max_waiting})

    async def client(self, tenant: str, role: Role = "manage", limits: Limits | None = None) -> httpx.AsyncClient:
        """Return a client with a new key, which the gateway finds if it has read no keys in the last second."""
        keys = self.replicas.apps["a"].state.services.keys
        _, secret = await keys.create("test", role, limits, tenant=tenant)
        headers, transport = {"Authorization": f"Bearer {secret}"}, httpx.ASGITransport(self.app)
        client = httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers)
        return await self._clients.enter_async_context(client)

    async def close(self) -> None:
        await self._clients.aclose()
        for app in self.replicas.apps.values():
            await app.state.services.decoder.stop()
            app.state.services.database.close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", request_timeout=30)


@pytest.fixture
async def fleet(settings: Settings) -> AsyncIterator[Fleet]:
    fleet = Fleet(settings)
    yield fleet
    await fleet.close()


async def store(client: httpx.AsyncClient, name: str) -> httpx.Response:
    response = await client.post("/v1/support_sets", json={"name": name, "examples": SHOTS})
    assert response.status_code == 200, response.text
    return response


async def test_support_sets_of_one_name_are_of_their_tenants_and_have_keys_of_their_own(fleet: Fleet) -> None:
    acme, other, operator = [await fleet.client(tenant) for tenant in ("acme", "other", "")]
    made = [await store(client, "shots") for client in (acme, other)]
    for client, response in zip((acme, other), made, strict=True):
        assert (await client.get("/v1/support_sets/shots")).json()["id"] == response.json()["id"]
        (listed,) = (await client.get("/v1/support_sets")).json()["data"]
        assert listed["id"] == response.json()["id"]
    assert (await operator.get("/v1/support_sets/shots")).status_code == 404
    assert {call.key for call in fleet.replicas.calls} == {"acme/shots", "other/shots", "shots", None}


async def test_prompts_of_two_tenants_with_the_same_pictures_have_different_keys(fleet: Fleet) -> None:
    await ask_with_pictures(fleet)
    first, second, third = [call.key for call in fleet.replicas.calls]
    assert first != second
    assert third == str(first).removeprefix("acme/")


class TestSharedCaches:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"share_caches": True})

    async def test_prompts_with_the_same_pictures_have_one_key(self, fleet: Fleet) -> None:
        await ask_with_pictures(fleet)
        assert len({call.key for call in fleet.replicas.calls}) == 1


async def ask_with_pictures(fleet: Fleet) -> None:
    """Send the same prompt with keys of two tenants and of the default one."""
    picture = {"type": "image_url", "image_url": {"url": data_url(png())}}
    for client in [await fleet.client(tenant) for tenant in ("acme", "other", "")]:
        assert (await client.post("/v1/completions", json={"prompt": [picture, picture]})).status_code == 200


async def test_an_archive_goes_from_one_tenant_to_another(fleet: Fleet) -> None:
    acme, other = [await fleet.client(tenant) for tenant in ("acme", "other")]
    await store(acme, "archived")
    archive = (await acme.get("/v1/support_sets/archived/export")).content
    assert (await other.get("/v1/support_sets/archived/export")).status_code == 404
    headers = {"Content-Type": "application/zip"}
    received = await other.post("/v1/support_sets/import?name=received", content=archive, headers=headers)
    assert received.status_code == 200, received.text
    examples = [
        (await client.get(f"/v1/support_sets/{name}/examples")).json()["data"]
        for client, name in ((acme, "archived"), (other, "received"))
    ]
    assert examples[0] == examples[1]
    assert (await acme.get("/v1/support_sets/received")).status_code == 404


async def test_a_gateway_counts_what_it_reads_and_a_replica_what_it_computes(fleet: Fleet) -> None:
    limited = await fleet.client("acme", limits=Limits(requests=2))
    of_tokens = await fleet.client("acme", limits=Limits(tokens=1))
    statuses = [(await limited.get("/v1/models")).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    assert len(fleet.replicas.calls) == 2
    assert (await limited.get("/health")).status_code == 200
    answers = [await of_tokens.post("/v1/completions", json={"prompt": "a"}) for _ in range(8)]
    # each replica answers the first of its requests
    assert sorted(answer.status_code for answer in answers) == [200, 200, *[429] * 6]
    assert {answer.headers["x-replica"] for answer in answers if answer.status_code == 200} == {"a", "b"}


class TestUnreadResponses:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"max_bodies_mb": 1})

    async def test_they_count_as_bodies(self, fleet: Fleet) -> None:
        client, picture = await fleet.client("acme"), photograph()
        headers = {"Content-Type": "image/png"}
        stored = (await client.post("/v1/images", content=picture, headers=headers)).json()
        path = f"/v1/images/{stored['id']}/content"
        unread = [Reader(fleet.app, path, authorization=client.headers["authorization"]) for _ in range(2)]
        await eventually(lambda: [reader.status for reader in unread] == [200, 200])
        refused = await client.post("/v1/images", content=picture, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "client_over_share")
        for reader in unread:
            await reader.finish()
        assert sum(unread[0].pieces) == len(picture)
        assert (await client.post("/v1/images", content=picture, headers=headers)).status_code == 200

    async def test_an_archive_of_gigabytes_counts_like_a_large_response(self, monkeypatch: pytest.MonkeyPatch) -> None:
        admission, counted = Admission(8, Metrics("tiny")), list[int]()
        monkeypatch.setattr(gateway, "MAX_UNREAD", 3 * 2**18)

        async def batches() -> AsyncGenerator[list[Message], None]:
            for number in range(8):
                yield [{"type": "http.response.body", "body": bytes(2**18), "more_body": number < 7}]

        async def send(message: Message) -> None:
            counted.append(admission.bodies.used // 2**18)

        with admission.ticket("a") as ticket:
            start: Message = {"type": "http.response.start", "status": 200, "headers": []}
            await gateway._send_all([start], Answer(batches()), send, ticket, lambda: None)
        assert counted == [0, 1, 2, 3, 3, 3, 3, 3, 3]
        assert admission.bodies.used == 0


@pytest.mark.parametrize(
    ("headers", "fields"), [({"X-Request-Timeout": "0.2"}, {}), ({}, {"timeout": 0.2})], ids=["header", "field"]
)
async def test_a_deadline_holds_while_no_replica_has_room(
    headers: dict[str, str], fields: dict[str, Any], fleet: Fleet
) -> None:
    client, fleet.replicas.is_full = await fleet.client("acme"), True
    began = time.monotonic()
    refused = await client.post("/v1/completions", json={"prompt": "a", **fields}, headers=headers)
    assert time.monotonic() - began < 15  # half of what the server permits
    assert (refused.status_code, refused.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert refused.json()["error"]["message"] == "the request was not finished within 0.2 seconds"


@pytest.mark.parametrize("timeout", [0, -1, "soon", True, 10**400, 1e9])
async def test_a_wrong_limit_of_time_is_refused_by_the_replica(timeout: object, fleet: Fleet) -> None:
    client = await fleet.client("acme")
    refused = await client.post("/v1/completions", json={"prompt": "a", "timeout": timeout})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "timeout")


async def test_a_body_that_takes_long_to_parse_reaches_no_replica(fleet: Fleet) -> None:
    client = await fleet.client("acme")
    body = b'{"prompt":[' + b"1," * 2**19 + b"1]}"
    refused = await client.post("/v1/completions", content=body + b",", headers={"Content-Type": "application/json"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
    assert not fleet.replicas.calls


async def test_a_stream_that_is_lost_with_its_replica_is_counted(fleet: Fleet) -> None:
    client, fleet.replicas.is_cut = await fleet.client("acme"), True
    answer = await client.post("/v1/completions", json={"prompt": "a", "stream": True})
    assert answer.status_code == 200
    assert '"code":"replica_lost"' in answer.text
    counted = 'request_refused_total{code="replica_lost",model_name="",tenant="acme"} 1.0'
    assert counted in generate_latest(fleet.gateway._registry).decode()


async def test_a_running_gateway_applies_another_maximum_of_waiting_requests(fleet: Fleet) -> None:
    client = await fleet.client("acme")
    fleet.configure(max_waiting=0)
    refused = await client.post("/v1/completions", json={"prompt": "a"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    fleet.configure(max_waiting=1)
    assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 200


AS_JSON = {"Content-Type": "application/json"}
# requests of a key with the role `inference` that are refused, and what differs from a GET
REFUSED: dict[str, dict[str, Any]] = {
    "/v1/models": {"headers": {"Authorization": "Bearer unknown"}},
    "/v1/models?a=b": {"headers": {"X-Request-Timeout": "soon"}},
    "/v1/models#host": {"headers": {"Host": "evil.example"}},
    **{path: {"method": "POST"} for path in ("/health/live", "/health/ready", "/metrics")},
    "/v1/support_sets": {"method": "POST", "json": {"name": "x"}},
    "/v1/keys": {},
    "/v1/support_sets/nowhere": {},
    "/v1/images/img_0": {},
    "/v1/completions": {"method": "POST", "json": {"prompt": "a", "cats": 1}},
    "/v1/score": {"method": "POST", "content": b"{", "headers": AS_JSON},
    "/v1/classify": {},
    "/v2/nothing": {},
}


async def test_refusals_are_word_for_word_those_of_one_server(fleet: Fleet) -> None:
    client = await fleet.client("acme", "inference")
    transport = httpx.ASGITransport(fleet.replicas.apps["a"])
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=client.headers) as server:
        for path, request in REFUSED.items():
            answers = [await each.request(url=path, **{"method": "GET", **request}) for each in (client, server)]
            (status, body, again), (expected_status, expected_body, expected_again) = map(refusal, answers)
            assert status == expected_status >= 400
            assert (body, again) == (expected_body, expected_again)


def refusal(response: httpx.Response) -> tuple[int, dict[str, Any], str | None]:
    return response.status_code, response.json(), response.headers.get("x-should-retry")


class TestAReplicaThatHangs:
    @pytest.fixture(autouse=True)
    def seconds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gateway, "FLEET_SECONDS", 0.5)

    @pytest.mark.parametrize("state", ["hung", "lost", "older"])
    async def test_the_metrics_of_the_rest_are_served_and_it_is_counted(self, state: str, fleet: Fleet) -> None:
        operator = await fleet.client("")
        assert "\nflamboyance:replicas_silent 0.0" in (await operator.get("/metrics")).text
        fleet.replicas.states["a"] = state
        text = (await operator.get("/metrics")).text
        assert 'requests_total{replica="b"} 1.0' in text
        assert 'replica="a"' not in text
        assert "\nflamboyance:replicas_silent 1.0" in text

    async def test_the_fleet_is_ready_at_once(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gateway, "FLEET_SECONDS", 60)
        fleet.replicas.states["a"] = "hung"
        operator, began = await fleet.client(""), time.monotonic()
        ready = await operator.get("/health/ready")
        assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
        assert time.monotonic() - began < 30

    async def test_the_fleet_is_as_ready_as_the_rest(self, fleet: Fleet) -> None:
        fleet.replicas.states |= {"a": "hung", "b": "restarting"}
        ready = await (await fleet.client("")).get("/health/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "restarting"})
        fleet.replicas.states["b"] = "hung"
        ready = await (await fleet.client("")).get("/health/ready/")
        assert (ready.status_code, ready.json()) == (503, {"status": "starting"})


class Unreachable:
    """A deployment whose replicas cannot even be listed in time."""

    def broadcast(self, method: str) -> Unreachable:
        return self

    async def _fetch_replica_results_async(self) -> list[Any]:
        raise TimeoutError


async def test_a_deployment_that_cannot_be_reached_is_silent() -> None:
    assert [await answer for answer in await _ask(cast(Any, Unreachable()), "metrics")] == [None]
