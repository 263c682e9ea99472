"""A fleet with keys of several tenants, from the database alone: every gateway and every replica reads them there.

`make test-deploy` runs this. The tests share one fleet, which is open until the first of them makes a key.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from deploy.ray.affinity import ranked
from deploy.tests.ray_fleet import REQUEST_SECONDS, ROOT, Fleet, running
from flamboyance_client import Client, NotFound
from server.access.keys import MAX_WAIT_SECONDS, MISSING_SECONDS, REFRESH_SECONDS
from server.settings import child_environment
from tests.server.conftest import data_url, png

GATEWAYS = 2
# requests after which each gateway and each replica has had some
MANY = 24
# tokens of an answer that takes some seconds
LONG = 1000
SETS = [f"set-{number}" for number in range(6)]
SHOTS = [{"image": data_url(png("red")), "label": "red"}, {"image": data_url(png("blue")), "label": "blue"}]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    models = dict.fromkeys(("first", "second"), "openflamingo")
    with running(tmp_path_factory.mktemp("fleet"), models, ["--gateways", str(GATEWAYS)]) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def admin(fleet: Fleet) -> str:
    """The secret of the first key, which the command makes while the fleet runs."""
    command = [sys.executable, "-m", "server.access", "create", "me", "--role", "admin", "--database", fleet.database]
    made = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, check=True)
    time.sleep(REFRESH_SECONDS)
    return made.stdout.strip()


class Keyring:
    """Makes keys through the fleet, and clients with them."""

    def __init__(self, fleet: Fleet, admin: str) -> None:
        self._url = fleet.url
        self.admin = self._client(admin)
        self.clients: list[httpx.Client] = [self.admin]

    def make(self, tenant: str, role: str = "manage", **limits: int) -> tuple[str, httpx.Client]:
        """Make a key that every process knows, and return its id and a client with it."""
        made = self.admin.post("/v1/keys", json={"name": "test", "tenant": tenant, "role": role, "limits": limits})
        assert made.status_code == 200, made.text
        time.sleep(MISSING_SECONDS)
        client = self._client(made.json()["key"])
        self.clients.append(client)
        return made.json()["id"], client

    def _client(self, secret: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {secret}"}
        return httpx.Client(base_url=self._url, headers=headers, timeout=REQUEST_SECONDS)


@pytest.fixture(scope="module")
def keyring(fleet: Fleet, admin: str) -> Iterator[Keyring]:
    keyring = Keyring(fleet, admin)
    yield keyring
    for client in keyring.clients:
        client.close()


@pytest.fixture(scope="module")
def acme(keyring: Keyring) -> httpx.Client:
    return keyring.make("acme")[1]


@pytest.fixture(scope="module")
def other(keyring: Keyring) -> httpx.Client:
    return keyring.make("other")[1]


def ask(client: httpx.Client, support_set: str, **fields: Any) -> httpx.Response:
    """Complete after an example of a support set of texts."""
    examples, template = {"support_set": support_set, "k": 1}, {"shot": "{text}", "query": "a"}
    body = {"examples": examples, "query": {}, "template": template, "max_tokens": 1, **fields}
    return client.post("/v1/fewshot/completions", json=body)


def test_the_first_key_closes_the_fleet(fleet: Fleet, request: pytest.FixtureRequest) -> None:
    with httpx.Client(base_url=fleet.url, timeout=REQUEST_SECONDS) as http:
        assert {http.get("/v1/models").status_code for _ in range(MANY)} == {200}
        admin: str = request.getfixturevalue("admin")
        answers = [http.get("/v1/models") for _ in range(MANY)]
        assert {(answer.status_code, answer.json()["error"]["code"]) for answer in answers} == {
            (401, "invalid_api_key")
        }
        headers = {"Authorization": f"Bearer {admin}"}
        assert {http.get("/v1/models", headers=headers).status_code for _ in range(MANY)} == {200}
        assert {http.get(path).status_code for path in ("/health/live", "/health/ready", "/metrics")} == {200}
        assert http.get("/-/routes").json() == {"/": "flamboyance"}  # what Ray's proxy answers without a key


def test_a_new_key_is_accepted_and_a_revoked_one_refused_by_all(keyring: Keyring) -> None:
    key_id, client = keyring.make("acme")
    answers = [client.get("/v1/models") for _ in range(MANY)]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.headers["x-replica"] for answer in answers}) == 2
    assert keyring.admin.delete(f"/v1/keys/{key_id}").json()["deleted"] is True
    revoked_at = time.monotonic()
    # a request waits so long for the keys to be read again
    while time.monotonic() - revoked_at < REFRESH_SECONDS + MAX_WAIT_SECONDS:
        assert client.get("/v1/models").status_code in (200, 401)
        time.sleep(0.05)
    assert {client.get("/v1/models").status_code for _ in range(MANY)} == {401}


def test_tenants_have_support_sets_and_pictures_of_their_own(
    fleet: Fleet, acme: httpx.Client, other: httpx.Client, keyring: Keyring
) -> None:
    made = [http.post("/v1/support_sets", json={"name": "shots", "examples": SHOTS}) for http in (acme, other)]
    assert [response.status_code for response in made] == [200, 200]
    ids = [response.json()["id"] for response in made]
    assert ids[0] != ids[1]
    for http, visible, hidden in ((acme, *ids), (other, *reversed(ids))):
        for _ in range(MANY):
            listed = [card["id"] for card in http.get("/v1/support_sets").json()["data"]]
            assert visible in listed
            assert hidden not in listed
        assert http.get("/v1/support_sets/shots").json()["id"] == visible
        assert http.get(f"/v1/support_sets/{hidden}").status_code == 404
    assert keyring.admin.get("/v1/support_sets/shots").status_code == 404
    with Client(fleet.url, api_key=_secret(acme)) as mine, Client(fleet.url, api_key=_secret(other)) as theirs:
        stored = mine.images.upload(png("green"))
        for _ in range(MANY // 3):
            assert mine.images.content(stored.id) == png("green")
            with pytest.raises(NotFound):
                theirs.images.content(stored.id)


def _secret(client: httpx.Client) -> str:
    return client.headers["authorization"].removeprefix("Bearer ")


def test_a_set_lives_at_the_replica_of_its_tenant_and_name(
    fleet: Fleet, acme: httpx.Client, other: httpx.Client
) -> None:
    replicas = list(fleet.replicas())
    homes = {}
    for tenant, http in (("acme", acme), ("other", other)):
        for name in SETS:
            made = http.post("/v1/support_sets", json={"name": name, "examples": [{"text": "a"}]})
            assert made.status_code == 200, made.text
            answers = [made, http.get(f"/v1/support_sets/{name}"), ask(http, name)]
            assert [answer.status_code for answer in answers] == [200] * 3
            (homes[tenant, name],) = {answer.headers["x-replica"] for answer in answers}
    assert homes == {(tenant, name): ranked(f"{tenant}/{name}", replicas)[0] for tenant, name in homes}


def test_each_gateway_and_each_replica_counts_requests_for_itself(keyring: Keyring) -> None:
    _, client = keyring.make("acme", "inference", requests=5)
    answers = [client.get("/v1/models") for _ in range(MANY)]
    accepted = [answer for answer in answers if answer.status_code == 200]
    assert 5 <= len(accepted) <= 5 * GATEWAYS
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {(answer.status_code, answer.json()["error"]["code"]) for answer in refused} == {(429, "quota_exceeded")}
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
    assert {client.get("/health").status_code for _ in range(MANY)} == {200}


def test_tokens_are_counted_where_they_are_computed(fleet: Fleet, acme: httpx.Client, keyring: Keyring) -> None:
    _, client = keyring.make("acme", "inference", tokens=1)
    replicas = list(fleet.replicas())
    names = {ranked(f"acme/{name}", replicas)[0]: name for name in (f"of-tokens-{number}" for number in range(20))}
    assert len(names) == 2
    for name in names.values():
        assert acme.post("/v1/support_sets", json={"name": name, "examples": [{"text": "a"}]}).status_code == 200
        assert [ask(client, name).status_code for _ in range(3)] == [200, 429, 429]


def test_the_limit_of_support_sets_is_the_tenants_whatever_replica_answers(keyring: Keyring) -> None:
    _, client = keyring.make("limited", support_sets=3)
    bodies = [{"name": f"set-{number}", "examples": [{"text": "a"}]} for number in range(8)]
    assert [client.post("/v1/support_sets", json=body).status_code for body in bodies].count(200) == 3


def test_an_archive_goes_from_one_tenant_to_another(
    fleet: Fleet, acme: httpx.Client, other: httpx.Client, keyring: Keyring
) -> None:
    assert acme.post("/v1/support_sets", json={"name": "archived", "examples": SHOTS}).status_code == 200
    archive = acme.get("/v1/support_sets/archived/export").content
    assert other.get("/v1/support_sets/archived/export").status_code == 404

    def send(http: httpx.Client) -> httpx.Response:
        headers = {"Content-Type": "application/zip", "Idempotency-Key": "the-same"}
        return http.post("/v1/support_sets/import?name=received", content=archive, headers=headers)

    imported = [send(other) for _ in range(4)]
    assert {response.status_code for response in imported} == {200}, imported[0].text
    assert len({response.json()["id"] for response in imported}) == 1
    sent, received = (
        http.get(f"/v1/support_sets/{name}/examples").json()["data"]
        for http, name in ((acme, "archived"), (other, "received"))
    )
    assert sent == received
    assert len(received) == len(SHOTS)
    assert acme.get("/v1/support_sets/received").status_code == 404
    with Client(fleet.url, api_key=_secret(other)) as theirs:
        reply = theirs.fewshot.complete(png("green"), examples={"support_set": "received", "k": 2}, max_tokens=1)
        assert len(reply.raw["fewshot"]["shots"]) == 2
    refused = send(keyring.make("other", "inference")[1])
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")


BY_HEADER, BY_FIELD = {"headers": {"X-Request-Timeout": "0.5"}}, {"json": {"timeout": 0.5}}


@pytest.mark.parametrize("limit", [BY_HEADER, BY_FIELD], ids=["header", "field"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_request_ends_at_its_deadline(acme: httpx.Client, limit: dict[str, Any], is_stream: bool) -> None:
    body = {"prompt": "a", "max_tokens": LONG, "ignore_eos": True, "stream": is_stream, **limit.get("json", {})}
    response = acme.post("/v1/completions", json=body, headers=limit.get("headers"))
    error = _last_event(response)["error"] if is_stream else response.json()["error"]
    assert (response.status_code, error["code"]) == (200 if is_stream else 504, "deadline_exceeded")
    assert error["message"] == "the request was not finished within 0.5 seconds"


def _last_event(response: httpx.Response) -> dict[str, Any]:
    *_, event, end = [line for line in response.text.splitlines() if line]
    assert end == "data: [DONE]"
    parsed: dict[str, Any] = json.loads(event.removeprefix("data: "))
    return parsed
