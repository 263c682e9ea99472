"""Tenants: what the keys of one store, name and evaluate, the keys of another cannot see, name or take."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.access.quotas import Limits
from server.engine_client.salt import add_salt
from server.fewshot.maintenance import Maintenance
from server.limits.background import Background
from server.quality.evaluation_runner import EvaluationRunner
from server.quality.leave_one_out import LeaveOneOut
from server.settings import Settings
from tests.server.access.conftest import EXAMPLES, SETS, Keyring, create
from tests.server.conftest import data_url, image_part, png
from tests.server.decisions import PREDICATE, image, user
from tests.server.fakes import FakeClient

pytestmark = pytest.mark.anyio

ACME, OTHER = add_salt(b"", "tenant", "acme"), add_salt(b"", "tenant", "other")
IMAGES, EVALUATIONS = "/v1/images", "/v1/evaluations"


async def upload(http: httpx.AsyncClient, colour: str) -> str:
    response = await http.post(IMAGES, json={"url": data_url(png(colour))})
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


async def ids(http: httpx.AsyncClient, path: str) -> list[str]:
    return [entry["id"] for entry in (await http.get(path)).json()["data"]]


async def test_two_tenants_have_sets_of_one_name(acme: httpx.AsyncClient, other: httpx.AsyncClient) -> None:
    first, second = await create(acme, "birds"), await create(other, "birds", examples=EXAMPLES[:1])
    assert (first["name"], second["name"]) == ("birds", "birds")
    assert (await acme.get(f"{SETS}/birds")).json()["num_examples"] == 4
    assert (await other.get(f"{SETS}/birds")).json()["num_examples"] == 1
    assert (await ids(acme, SETS), await ids(other, SETS)) == ([first["id"]], [second["id"]])
    taken = await acme.post(SETS, json={"name": "birds", "examples": []})
    assert (taken.status_code, taken.json()["error"]["code"]) == (409, "name_taken")
    renamed = await acme.patch(f"{SETS}/birds", json={"name": "fowl"})
    assert renamed.json()["name"] == "fowl"
    assert (await other.get(f"{SETS}/fowl")).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "", None),
        ("PATCH", "", {"pinned": True}),
        ("DELETE", "", None),
        ("GET", "/versions", None),
        ("GET", "/examples", None),
        ("GET", "/examples/a", None),
        ("POST", "/examples", {"examples": EXAMPLES[:1]}),
        ("DELETE", "/examples?id=a", None),
        ("DELETE", "/examples/a", None),
        ("GET", "/diagnostics", None),
        ("GET", "/export", None),
        ("POST", "/warm", {}),
        ("POST", "/evaluate", {}),
        ("POST", "/search", {"query": {"media": [image_part()]}, "k": 1}),
        ("POST", "/suggest", {"pool": [{"media": [image_part()]}]}),
    ],
)
async def test_the_sets_of_another_tenant_are_not_found(
    acme: httpx.AsyncClient, other: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None
) -> None:
    created = await create(acme, "s")
    for name in (created["id"], "s", "acme/s"):
        response = await other.request(method, f"{SETS}/{name.replace('/', '%2F')}{path}", json=body)
        assert response.status_code == 404, response.text
    assert (await acme.get(f"{SETS}/s")).json()["latest_version"] == 1


@pytest.mark.parametrize("route", ["/v1/fewshot/completions", "/v1/classify", "/v1/decisions"])
async def test_a_request_takes_no_shots_of_another_tenant(
    acme: httpx.AsyncClient, other: httpx.AsyncClient, route: str
) -> None:
    created = await create(acme, "s")
    query: dict[str, Any] = {"query": {"media": [image_part(png("red"))]}}
    if route == "/v1/decisions":
        query = DECISION
    for name in (created["id"], "s", "acme/s"):
        response = await other.post(route, json={"examples": {"support_set": name}, **query})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "support_set_not_found")


async def test_uploads_are_a_tenants_own(acme: httpx.AsyncClient, other: httpx.AsyncClient, client: FakeClient) -> None:
    image_id = await upload(acme, "red")
    part = {"type": "image_id", "image_id": image_id}
    completion = {"prompt": [part, {"type": "text", "text": "?"}], "max_tokens": 1}
    assert (await acme.post("/v1/completions", json=completion)).status_code == 200
    for name in (image_id, f"acme/{image_id}", f"tenants/acme/{image_id}"):
        part["image_id"] = name
        refused = await other.post("/v1/completions", json=completion)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "image_not_found")
    assert await ids(other, IMAGES) == []
    for path in (f"{IMAGES}/{image_id}", f"{IMAGES}/{image_id}/content"):
        assert (await other.get(path)).status_code == 404
        assert (await acme.get(path)).status_code == 200
    assert (await other.delete(f"{IMAGES}/{image_id}")).status_code == 404
    assert await upload(other, "red") == image_id  # the same bytes have the same id
    assert (await other.delete(f"{IMAGES}/{image_id}")).status_code == 200
    assert await ids(acme, IMAGES) == [image_id]


async def test_the_default_tenant_does_not_see_the_others(keyring: Keyring, acme: httpx.AsyncClient) -> None:
    operator = await keyring.client("", "admin")
    created, image_id = await create(acme, "s"), await upload(acme, "red")
    for name in (created["id"], "s", "acme%2Fs"):
        assert (await operator.get(f"{SETS}/{name}")).status_code == 404
    for name in (image_id, f"acme%2F{image_id}"):
        assert (await operator.get(f"{IMAGES}/{name}")).status_code == 404
    assert (await ids(operator, SETS), await ids(operator, IMAGES)) == ([], [])


async def test_media_are_swept_tenant_by_tenant(
    app: FastAPI, acme: httpx.AsyncClient, other: httpx.AsyncClient
) -> None:
    await create(acme, "s")
    await create(other, "s")
    assert len(await ids(acme, IMAGES)) == 4
    await acme.delete(f"{SETS}/s")
    await app.state.services.support_sets.sweep()
    assert await ids(acme, IMAGES) == []
    assert len(await ids(other, IMAGES)) == 4
    assert (await other.get(f"{SETS}/s")).json()["num_media"] == 4


async def test_names_of_media_are_a_tenants_own(acme: httpx.AsyncClient, other: httpx.AsyncClient) -> None:
    named = {**image_part(png("red")), "uuid": "mine"}
    by_name = {"type": "image_url", "image_url": None, "uuid": "mine"}

    async def complete(http: httpx.AsyncClient, part: dict[str, Any]) -> int:
        body = {"prompt": [part, {"type": "text", "text": "?"}], "max_tokens": 1}
        return (await http.post("/v1/completions", json=body)).status_code

    assert await complete(acme, named) == 200
    assert await complete(acme, by_name) == 200
    assert await complete(other, by_name) == 404
    assert await complete(other, {**image_part(png("blue")), "uuid": "mine"}) == 200


async def test_an_idempotency_key_is_a_tenants_own(acme: httpx.AsyncClient, other: httpx.AsyncClient) -> None:
    body, headers = {"examples": EXAMPLES[:1]}, {"Idempotency-Key": "1"}
    first = (await acme.post(SETS, json=body, headers=headers)).json()
    assert (await acme.post(SETS, json=body, headers=headers)).json()["id"] == first["id"]
    assert (await other.post(SETS, json=body, headers=headers)).json()["id"] != first["id"]


async def test_evaluations_are_a_tenants_own(
    app: FastAPI, acme: httpx.AsyncClient, other: httpx.AsyncClient, client: FakeClient
) -> None:
    await create(acme, "s")
    created = (await acme.post(f"{SETS}/s/evaluate", json={"methods": ["nearest_mean"]})).json()
    path = f"{EVALUATIONS}/{created['id']}"
    assert await ids(acme, EVALUATIONS) == [created["id"]]
    assert await ids(other, EVALUATIONS) == []
    for method, address in (("GET", path), ("POST", f"{path}/cancel"), ("DELETE", path)):
        assert (await other.request(method, address)).status_code == 404
    services, tenants = app.state.services, app.state.tenants

    def leave_one_out(tenant: str) -> LeaveOneOut:
        services = tenants.of(tenant)
        return LeaveOneOut(services.shots, services.comparison, services.engine, services.model, services.metrics)

    runner = EvaluationRunner(services.evaluations, leave_one_out, services.metrics, Background(services.admission), 1)
    await runner.start()
    states: list[str] = []

    async def is_completed() -> bool:
        states.append((await acme.get(path)).json()["status"])
        return states[-1] in ("completed", "failed")

    for _ in range(200):
        if await is_completed():
            break
        await asyncio.sleep(0.05)
    await runner.stop()
    assert states[-1] == "completed"
    assert set(client.salts) == {ACME}


async def test_each_tenant_has_a_salt_and_the_default_one_none(
    keyring: Keyring, acme: httpx.AsyncClient, client: FakeClient
) -> None:
    operator = await keyring.client("")
    for http in (operator, acme, await keyring.client("acme", "inference"), await keyring.client("other")):
        assert (await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})).status_code == 200
    assert client.salts == [b"", ACME, ACME, OTHER]


class TestSharedCaches:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"share_caches": True})

    async def test_tenants_share_the_engines_caches_alone(
        self, acme: httpx.AsyncClient, other: httpx.AsyncClient, client: FakeClient
    ) -> None:
        for http in (acme, other):
            assert (await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})).status_code == 200
        assert client.salts == [b"", b""]
        await create(acme, "s")
        assert (await other.get(f"{SETS}/s")).status_code == 404

    async def test_a_tenant_cannot_unpin_the_media_of_another_one(
        self, maintenance: Maintenance, acme: httpx.AsyncClient, other: httpx.AsyncClient, client: FakeClient
    ) -> None:
        for http in (acme, other):
            await create(http, "s", pinned=True)
        await asyncio.gather(*await maintenance.run_once())
        pinned = client.pinned
        await acme.patch(f"{SETS}/s", json={"pinned": False})
        await asyncio.gather(*await maintenance.run_once())
        assert client.pinned == pinned
        await other.patch(f"{SETS}/s", json={"pinned": False})
        await asyncio.gather(*await maintenance.run_once())
        assert client.pinned == set()


PICTURE = [image_part(png("red")), {"type": "text", "text": "?"}]
DECISION = {"input": [user(image())], "questions": [PREDICATE]}
SHOTS = [{"media": [image_part(png(colour))], "label": colour} for colour in ("red", "blue")]


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/completions", {"prompt": PICTURE, "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PICTURE}], "max_tokens": 1}),
        (
            "/v1/fewshot/completions",
            {"shots": SHOTS[:1], "query": {"media": [image_part()]}, "template": "classification"},
        ),
        ("/v1/classify", {"shots": SHOTS, "query": {"media": [image_part()]}, "method": "in_context"}),
        ("/v1/classify", {"shots": SHOTS, "query": {"media": [image_part()]}, "method": "nearest_mean"}),
        ("/v1/score", {"prompt": PICTURE, "candidates": ["a", "b"]}),
        ("/v1/decisions", DECISION),
        ("/v1/embeddings", {"input": [image_part(png("red"))]}),
        ("/v1/inspect", {"prompt": PICTURE}),
    ],
)
async def test_a_request_may_have_a_salt_of_its_own(
    http: httpx.AsyncClient, client: FakeClient, route: str, body: dict[str, Any]
) -> None:
    for salt in ("x", "y"):
        response = await http.post(route, json={**body, "cache_salt": salt})
        assert response.status_code == 200, response.text
    assert set(client.salts) == {add_salt(b"", "request", "x"), add_salt(b"", "request", "y")}
    refused = await http.post(route, json={**body, "cache_salt": ""})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "cache_salt")


async def test_the_salts_of_a_tenant_and_of_its_request_add_up(acme: httpx.AsyncClient, client: FakeClient) -> None:
    body = {"prompt": "a", "max_tokens": 1, "cache_salt": "x"}
    assert (await acme.post("/v1/completions", json=body)).status_code == 200
    assert client.salts == [add_salt(ACME, "request", "x")]


async def test_no_salt_of_a_request_is_that_of_a_tenant(keyring: Keyring, client: FakeClient) -> None:
    body = {"prompt": "a", "max_tokens": 1, "cache_salt": "acme"}
    assert (await (await keyring.client("")).post("/v1/completions", json=body)).status_code == 200
    assert client.salts == [add_salt(b"", "request", "acme")]
    assert client.salts != [ACME]


async def test_the_sets_of_a_tenant_are_limited(keyring: Keyring) -> None:
    http = await keyring.client("acme", limits=Limits(support_sets=2))
    await create(await keyring.client("other"), "s")
    await create(http, "s")
    await create(http, "t")
    refused = await http.post(SETS, json={"examples": EXAMPLES})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "too_many_support_sets")
    archive = (await http.get(f"{SETS}/s/export")).content
    refused = await http.post(f"{SETS}/import?name=u", content=archive, headers={"Content-Type": "application/zip"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "too_many_support_sets")
    await http.delete(f"{SETS}/t")
    response = await http.post(f"{SETS}/import?name=u", content=archive, headers={"Content-Type": "application/zip"})
    assert (response.status_code, response.json()["num_examples"]) == (200, 4)


async def test_an_archive_moves_a_set_to_another_tenant(acme: httpx.AsyncClient, other: httpx.AsyncClient) -> None:
    await create(acme, "s")
    archive = (await acme.get(f"{SETS}/s/export")).content
    imported = await other.post(f"{SETS}/import", content=archive, headers={"Content-Type": "application/zip"})
    assert (imported.status_code, imported.json()["num_media"]) == (200, 4)
    assert len(await ids(other, IMAGES)) == 4


async def test_administrators_of_a_tenant_manage_its_keys_alone(keyring: Keyring) -> None:
    operator, acme = await keyring.client("", "admin"), await keyring.client("acme", "admin")
    made = await acme.post("/v1/keys", json={"name": "own"})
    assert made.json()["tenant"] == "acme"
    refused = await acme.post("/v1/keys", json={"name": "x", "tenant": "other"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "tenant")
    assert (await operator.post("/v1/keys", json={"name": "x", "tenant": "other"})).json()["tenant"] == "other"
    assert {key["tenant"] for key in (await acme.get("/v1/keys")).json()["data"]} == {"acme"}
    by_tenant = {key["tenant"]: key["id"] for key in (await operator.get("/v1/keys")).json()["data"]}
    assert set(by_tenant) == {None, "acme", "other"}
    assert (await acme.delete(f"/v1/keys/{by_tenant['other']}")).status_code == 404
    assert (await acme.delete(f"/v1/keys/{by_tenant[None]}")).status_code == 404
    assert (await operator.delete(f"/v1/keys/{by_tenant['other']}")).status_code == 200


async def test_a_key_makes_none_that_permits_more(keyring: Keyring) -> None:
    http = await keyring.client("acme", "admin", Limits(requests=9, support_sets=2))
    for limits, made in (({}, (9, None, 2)), ({"requests": 3, "tokens": 5}, (3, 5, 2))):
        answer = (await http.post("/v1/keys", json={"name": "x", "limits": limits})).json()["limits"]
        assert (answer["requests"], answer["tokens"], answer["support_sets"]) == made
    refused = await http.post("/v1/keys", json={"name": "x", "limits": {"support_sets": 3}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "limits.support_sets")


@pytest.mark.parametrize("tenant", ["", "A", "a/b", "..", "a" * 49, "-a"])
async def test_the_name_of_a_tenant_can_be_part_of_a_path(keyring: Keyring, tenant: str) -> None:
    operator = await keyring.client("", "admin")
    refused = await operator.post("/v1/keys", json={"name": "x", "tenant": tenant})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tenant")


class TestGuardedMetrics:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"guard_metrics": True})

    async def test_metrics_are_the_operators(self, keyring: Keyring, acme: httpx.AsyncClient) -> None:
        assert (await (await keyring.client("", "inference")).get("/metrics")).status_code == 200
        refused = await acme.get("/metrics")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")


async def test_refusals_are_counted_by_tenant(keyring: Keyring, acme: httpx.AsyncClient) -> None:
    await acme.post("/v1/completions", json={})
    text = (await acme.get("/metrics")).text
    assert 'flamboyance:request_refused_total{code="invalid_value",model_name="tiny",tenant="acme"} 1.0' in text
