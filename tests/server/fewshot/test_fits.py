"""Methods are fitted to a version once: a restart does not fit again, and other models and sets do not read the fit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from sqlalchemy import func, select

from server.errors import DatabaseUnavailable
from server.fewshot import comparison as comparison_module
from server.fewshot.confidence import Confidence
from server.fewshot.fits import RETENTION_SECONDS, Fit, FitStore, FittedVersion, LeftOut
from server.fewshot.methods import METHODS, load_method
from server.fewshot.methods.likeness import Labelled
from server.fewshot.methods.linear import Linear
from server.fewshot.methods.nearest import NearestMean, NearestNeighbours
from server.fewshot.retrieval import EmbeddingStore
from server.schemas.responses.evaluations import CurvePoint
from server.settings import Settings
from server.store.database import Database
from server.store.media_references import MediaReferences
from server.store.records import FitRow
from server.store.support_sets import SupportSets
from tests.server.colours import QUERY, app, application, settings, url
from tests.server.conftest import data_url, png
from tests.server.fakes import FakeClient

__all__ = ["app", "settings"]  # fixtures

pytestmark = pytest.mark.anyio

EXAMPLES = [
    {"image": data_url(png(colour)), "label": label}
    for label, colours in (("warm", ("red", "yellow", "orange")), ("cold", ("blue", "green", "navy")))
    for colour in colours
]


@pytest.fixture
async def pets(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/support_sets", json={"name": "pets", "examples": EXAMPLES})
    assert answer.status_code == 200, answer.text


async def classify(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    body = {"query": {"image": url(QUERY)}, "examples": {"support_set": "pets"}, **fields}
    answer = await http.post("/v1/classify", json=body)
    assert answer.status_code == 200, answer.text
    names = ("method", "label", "confidence", "temperature", "threshold", "candidates")
    return {name: answer.json()[name] for name in names}


@asynccontextmanager
async def restarted(settings: Settings, client: FakeClient) -> AsyncIterator[httpx.AsyncClient]:
    """Begin a second run of the server, with the same data."""
    app = application(client, settings)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
        yield http
    await app.state.services.decoder.stop()
    app.state.services.database.close()


def forbid_fitting(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in (NearestMean, NearestNeighbours, Linear):
        monkeypatch.setattr(method, "fit", None)
    monkeypatch.setattr(comparison_module, "left_out_log_probabilities", None)


async def num_rows(database: Database) -> int:
    return await database.read(lambda session, now: session.scalar(select(func.count()).select_from(FitRow)) or 0)


@pytest.mark.parametrize("method", ["auto", "linear", "nearest_mean", "knn", "blend"])
async def test_a_restart_does_not_fit_again(
    http: httpx.AsyncClient,
    pets: None,
    settings: Settings,
    client: FakeClient,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    target = {} if method == "blend" else {"target_accuracy": 0.6}
    before = await classify(http, method=method, **target)
    async with restarted(settings, client) as again:
        forbid_fitting(monkeypatch)
        assert await classify(again, method=method, **target) == before


async def test_what_warming_fitted_is_read_after_a_restart(
    http: httpx.AsyncClient, pets: None, settings: Settings, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = (await http.post("/v1/support_sets/pets/warm", json={"wait": True})).json()
    assert (warm["status"], warm["warm"]["error"]) == ("ready", None)
    async with restarted(settings, client) as again:
        forbid_fitting(monkeypatch)
        assert (await classify(again, target_coverage=0.5))["method"] in METHODS


async def test_another_models_fits_are_not_used(
    http: httpx.AsyncClient, pets: None, settings: Settings, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await classify(http, method="linear")
    client.info = {"dtype": "another"}
    async with restarted(settings, client) as again:
        monkeypatch.setattr(Linear, "fit", None)
        answer = again.post(
            "/v1/classify",
            json={"query": {"image": url(QUERY)}, "examples": {"support_set": "pets"}, "method": "linear"},
        )
        with pytest.raises(TypeError):
            await answer


async def test_fits_to_a_part_of_the_labels_are_not_stored(http: httpx.AsyncClient, app: FastAPI, pets: None) -> None:
    await classify(http, method="nearest_mean", candidates=["cold"])
    assert await num_rows(app.state.services.database) == 0
    await classify(http, method="nearest_mean")
    assert await num_rows(app.state.services.database) == 1
    answer = await classify(http, method="nearest_mean", candidates=["cold"])
    assert [candidate["label"] for candidate in answer["candidates"]] == ["cold"]


async def test_deleting_a_set_deletes_its_fits(http: httpx.AsyncClient, app: FastAPI, pets: None) -> None:
    await classify(http)
    assert await num_rows(app.state.services.database) >= 1
    assert (await http.delete("/v1/support_sets/pets")).status_code == 200
    assert await num_rows(app.state.services.database) == 0


async def test_a_request_is_answered_although_its_fit_cannot_be_stored(
    http: httpx.AsyncClient, app: FastAPI, pets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*arguments: Any) -> None:
        raise DatabaseUnavailable("the database cannot be written: its disk is full")

    with monkeypatch.context() as full:
        full.setattr(FitStore, "put", fail)
        await classify(http)
    assert await num_rows(app.state.services.database) == 0
    await classify(http)
    assert await num_rows(app.state.services.database) >= 1


async def test_a_request_is_answered_although_vectors_cannot_be_stored(
    http: httpx.AsyncClient, app: FastAPI, pets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*arguments: Any) -> None:
        raise DatabaseUnavailable("the database cannot be written: its disk is full")

    monkeypatch.setattr(EmbeddingStore, "put", fail)
    await classify(http, method="nearest_mean")


async def test_fits_of_a_request_that_is_interrupted_are_stored_by_the_next_one(
    http: httpx.AsyncClient, app: FastAPI, pets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_storing = asyncio.Event()

    async def wait(*arguments: Any) -> None:
        is_storing.set()
        await asyncio.sleep(3600)

    with monkeypatch.context() as slow:
        slow.setattr(FitStore, "put", wait)
        request = asyncio.create_task(classify(http, method="linear"))
        await asyncio.wait_for(is_storing.wait(), 20)
        request.cancel()
        await asyncio.wait([request])
    assert await num_rows(app.state.services.database) == 0
    await classify(http, method="linear")
    assert await num_rows(app.state.services.database) >= 1


# the store


@pytest.fixture
def stored_sets(database: Database, media_references: MediaReferences) -> SupportSets:
    return SupportSets(database, media_references)


LEFT_OUT = LeftOut(
    np.array([True, False, True]), Confidence(2.3, (CurvePoint(0.5, 0.4, 1.0, 0.9), CurvePoint(0.0, 1.0, 0.7, 0.8)), 3)
)


@pytest.fixture
def labelled() -> Labelled:
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((9, 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Labelled(vectors.astype(np.float32), np.array([0, 1, 2] * 3), 3)


@pytest.mark.parametrize("method", METHODS)
async def test_a_fit_is_stored_exactly(
    stored_sets: SupportSets, database: Database, labelled: Labelled, method: str
) -> None:
    info = await stored_sets.create("s", [])
    fitted, store = load_method(method).fit(labelled), FitStore(database)
    version = FittedVersion(info.id, 1, "model-a")
    await store.put(version, {method: Fit(left_out=LEFT_OUT)})
    await store.put(version, {method: Fit(fitted.parameters(), LEFT_OUT)})
    fit = (await store.get(version))[method]
    assert fit.parameters is not None
    restored = load_method(method).restore(fit.parameters, labelled)
    queries = labelled.vectors[::-1]
    assert restored.log_probabilities(queries).tobytes() == fitted.log_probabilities(queries).tobytes()
    assert fit.left_out is not None
    assert (fit.left_out.is_correct.tolist(), fit.left_out.confidence) == ([True, False, True], LEFT_OUT.confidence)
    assert await store.get(FittedVersion(info.id, 1, "model-b")) == {}
    assert await store.get(FittedVersion(info.id, 2, "model-a")) == {}


async def test_fits_are_deleted_with_their_version_or_when_they_are_old(
    stored_sets: SupportSets, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, versions = FitStore(database), []
    for name in ("first", "second", "third"):
        versions.append(FittedVersion((await stored_sets.create(name, [])).id, 1, "model"))
        await store.put(versions[-1], {"knn": Fit(left_out=LEFT_OUT)})
    await stored_sets.delete("first")
    assert [len(await store.get(version)) for version in versions] == [0, 1, 1]
    await store.put(versions[0], {"knn": Fit(left_out=LEFT_OUT)})  # it was deleted while the method was fitted
    assert await store.get(versions[0]) == {}
    later = time.time() + RETENTION_SECONDS + 1
    monkeypatch.setattr(time, "time", lambda: later)
    await store.put(versions[2], {"linear": Fit(left_out=LEFT_OUT)})
    await store.sweep()
    assert [list(await store.get(version)) for version in versions] == [[], [], ["linear"]]
