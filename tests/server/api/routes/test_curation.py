"""`/v1/support_sets/{id}/diagnostics` and `/suggest`: findings by id, versions, bounded answers, and what is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from server.limits import turns
from server.media.source import encoded
from server.quality import curation, left_out
from server.quality.diagnostics import Diagnosing
from server.settings import Settings
from tests.server.conftest import data_url, png
from tests.server.fakes import CONFIG, FakeClient

pytestmark = pytest.mark.anyio

COLOURS = ("red", "darkred", "tomato", "green", "darkgreen", "lime", "blue")


def direction(degrees: float) -> np.ndarray:
    vector = np.zeros(CONFIG.vision.feature_dim, np.float32)
    vector[:2] = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return vector


# the third dog looks like a cat
ANGLES = dict(zip(COLOURS, (0, 30, 60, 170, 200, 32, 107), strict=True))
LABELS = dict(zip(COLOURS, ("cat", "cat", "cat", "dog", "dog", "dog"), strict=False))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A pool may have more media than a prompt."""
    return Settings(data_dir=tmp_path / "data", max_media_per_request=2)


@pytest.fixture(autouse=True)
def vectors(client: FakeClient) -> None:
    for colour, degrees in ANGLES.items():
        client.vectors[encoded(png(colour), "image", "").digest] = direction(degrees)


def image(colour: str) -> dict[str, Any]:
    return {"image": data_url(png(colour))}


def examples(*colours: str) -> list[dict[str, Any]]:
    return [{"id": colour, "label": LABELS[colour], **image(colour)} for colour in colours]


async def create(http: httpx.AsyncClient, *stored: dict[str, Any]) -> None:
    answer = await http.post("/v1/support_sets", json={"name": "pets", "examples": list(stored)})
    assert answer.status_code == 200, answer.text


async def diagnose(http: httpx.AsyncClient, **query: Any) -> dict[str, Any]:
    answer = await http.get("/v1/support_sets/pets/diagnostics", params=query)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def suggest(http: httpx.AsyncClient, *colours: str, **fields: Any) -> dict[str, Any]:
    body = {"pool": [image(colour) for colour in colours], **fields}
    answer = await http.post("/v1/support_sets/pets/suggest", json=body)
    assert answer.status_code == 200, answer.text
    reply: dict[str, Any] = answer.json()
    return reply


class TestDiagnostics:
    async def test_findings_name_examples_and_labels(self, http: httpx.AsyncClient) -> None:
        await create(http, *examples(*LABELS), {"id": "copy", "label": "cat", **image("red")})
        body = await diagnose(http)
        assert (body["object"], body["version"], body["examples"], body["labels"]) == (
            "support_set.diagnostics",
            1,
            7,
            2,
        )
        assert body["mislabelled"]["count"] == 1
        (wrong,) = body["mislabelled"]["data"]
        assert (wrong["id"], wrong["label"], wrong["looks_like"]) == ("lime", "dog", "cat")
        assert body["left_out"]["queries"] == 7
        assert body["left_out"]["accuracy"] == pytest.approx(6 / 7)
        assert 0.9 <= body["thresholds"]["similarity"] <= 0.999
        (copy,) = body["redundant"]["data"]
        assert (copy["id"], copy["duplicate_of"], copy["same_media"]) == ("copy", "red", True)
        assert {frozenset(pair["ids"]) for pair in body["conflicting"]["data"]} == {frozenset(("darkred", "lime"))}
        assert body["confused"] == {"count": 1, "data": [{"labels": ["cat", "dog"], "count": 1, "counts": [0, 1]}]}

    async def test_lists_are_bounded_and_counts_are_not(self, http: httpx.AsyncClient) -> None:
        copies = [{"id": f"copy-{number}", "label": "cat", **image("red")} for number in range(5)]
        await create(http, *examples(*LABELS), *copies)
        body = await diagnose(http, limit=2)
        assert body["redundant"]["count"] == 5
        assert [entry["id"] for entry in body["redundant"]["data"]] == ["copy-0", "copy-1"]

    async def test_a_version_is_diagnosed_once_and_versions_differ(
        self, http: httpx.AsyncClient, client: FakeClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await create(http, *examples(*LABELS))
        first = await diagnose(http)
        added = {"examples": [{"id": "new", "label": "cow", **image("blue")}]}
        assert (await http.post("/v1/support_sets/pets/examples", json=added)).status_code == 200
        second = await diagnose(http)
        assert (second["version"], second["examples"]) == (2, 7)
        assert second["single"] == {"count": 1, "data": ["cow"]}
        num_embedded = len(client.embedded)
        monkeypatch.setattr(curation, "Diagnosing", None)
        assert await diagnose(http, version=1) == first
        assert await diagnose(http) == second
        assert len(client.embedded) == num_embedded == 7

    async def test_a_diagnosis_is_computed_in_pieces_at_which_clients_take_turns(
        self, http: httpx.AsyncClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Comparing ten thousand examples with each other takes 25 seconds."""
        monkeypatch.setattr(left_out, "BLOCK", 6)
        monkeypatch.setattr(turns, "TURN_SECONDS", 0.0)
        compare, run, done = Diagnosing.compare, app.state.services.curation._run, list[str]()

        def compare_and_note(self: Diagnosing, rows: slice) -> None:
            compare(self, rows)
            done.append("piece")
            loop.call_soon_threadsafe(begin)

        def begin() -> None:
            if not tasks:
                tasks.append(asyncio.create_task(run(done.append, "other")))

        loop, tasks = asyncio.get_running_loop(), list[asyncio.Task[None]]()
        monkeypatch.setattr(Diagnosing, "compare", compare_and_note)
        await create(http, *examples(*LABELS))
        await diagnose(http)
        assert done.count("piece") == 6
        assert 0 < done.index("other") < 5

    async def test_examples_that_cannot_be_compared_are_counted(self, http: httpx.AsyncClient) -> None:
        bare = [{"id": "text", "label": "cat", "text": "a cat"}, {"id": "unlabelled", **image("blue")}]
        await create(http, *examples(*LABELS), *bare)
        body = await diagnose(http)
        assert (body["examples"], body["unlabelled"], body["without_media"]) == (6, 1, 1)

    async def test_a_set_of_single_labels_is_compared_and_not_judged(self, http: httpx.AsyncClient) -> None:
        await create(http, *examples("red", "green"))
        body = await diagnose(http)
        assert body["single"] == {"count": 2, "data": ["cat", "dog"]}
        assert body["left_out"] == {"queries": 0, "accuracy": None, "accuracy_interval": None}

    @pytest.mark.parametrize("stored", [(), ({"label": "cat", "text": "a cat"},), (image("red"),)])
    async def test_a_set_without_labelled_media_is_refused(
        self, http: httpx.AsyncClient, stored: tuple[dict[str, Any], ...]
    ) -> None:
        await create(http, *stored)
        answer = await http.get("/v1/support_sets/pets/diagnostics")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
        assert "no example has media and a label" in answer.json()["error"]["message"]

    async def test_too_many_examples_are_refused_with_both_numbers(
        self, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(curation, "MAX_EXAMPLES", 5)
        await create(http, *examples(*LABELS))
        for answer in (
            await http.get("/v1/support_sets/pets/diagnostics"),
            await http.post("/v1/support_sets/pets/suggest", json={"pool": [image("blue")]}),
        ):
            assert answer.status_code == 400
            assert answer.json()["error"]["message"].startswith("up to 5 examples")
            assert answer.json()["error"]["message"].endswith("there are 6")

    @pytest.mark.parametrize(
        ("path", "status", "param"),
        [
            ("pets/diagnostics?limit=0", 400, "limit"),
            ("pets/diagnostics?limit=1001", 400, "limit"),
            ("pets/diagnostics?top=1", 422, "top"),
            ("pets/diagnostics?version=9", 404, "version"),
            ("cows/diagnostics", 404, None),
        ],
    )
    async def test_an_error_names_the_field(
        self, http: httpx.AsyncClient, path: str, status: int, param: str | None
    ) -> None:
        await create(http, *examples(*LABELS))
        answer = await http.get(f"/v1/support_sets/{path}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)

    async def test_a_request_waits_for_its_turn_and_is_counted(self, http: httpx.AsyncClient, app: FastAPI) -> None:
        await create(http, *examples(*LABELS))
        services = app.state.services
        await diagnose(http)
        metrics = (await http.get("/metrics")).text
        assert 'request_success_total{finished_reason="stop",model_name="tiny"} 1.0' in metrics
        for _ in range(services.settings.max_num_queued):
            services.admission.queue.take("another")
        answer = await http.get("/v1/support_sets/pets/diagnostics")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")


class TestSuggestions:
    async def test_uncertain_media_come_first_with_their_reasons(self, http: httpx.AsyncClient) -> None:
        await create(http, *examples("red", "tomato", "green", "darkgreen"))
        body = await suggest(http, "darkred", "blue", "lime", count=2)
        assert body["data"][0]["index"] == 1
        assert len(body["data"]) == 2
        first = body["data"][0]
        assert sorted(label["label"] for label in first["labels"]) == ["cat", "dog"]
        assert sum(label["probability"] for label in first["labels"]) == pytest.approx(1)
        margin = abs(first["labels"][0]["probability"] - first["labels"][1]["probability"])
        assert first["reason"]["margin"] == pytest.approx(margin)
        assert first["reason"]["similarity"] == pytest.approx(np.cos(np.radians(47)), abs=1e-5)
        assert 0 < first["reason"]["gain"] < 1
        assert body["method"] in ("nearest_mean", "knn", "linear")
        assert (body["known"], body["repeated"]) == ([], [])

    async def test_an_image_is_as_uncertain_as_a_classification_of_it(self, http: httpx.AsyncClient) -> None:
        await create(http, *examples("red", "tomato", "green", "darkgreen"))
        (suggestion,) = (await suggest(http, "blue", count=1))["data"]
        body = {"examples": {"support_set": "pets"}, "query": image("blue")}
        classified = (await http.post("/v1/classify", json=body)).json()
        expected = {entry["label"]: pytest.approx(entry["probability"]) for entry in classified["candidates"]}
        assert {entry["label"]: entry["probability"] for entry in suggestion["labels"]} == expected

    async def test_media_of_the_set_and_repeated_ones_are_named_and_not_suggested(
        self, http: httpx.AsyncClient
    ) -> None:
        await create(http, *examples("red", "tomato", "green", "darkgreen"), {"id": "unlabelled", **image("lime")})
        body = await suggest(http, "red", "blue", "blue", "lime", "red")
        assert [entry["index"] for entry in body["data"]] == [1]
        assert body["known"] == [
            {"index": 0, "example": "red"},
            {"index": 3, "example": "unlabelled"},
            {"index": 4, "example": "red"},
        ]
        assert body["repeated"] == [{"index": 2, "first_index": 1}]
        body = await suggest(http, "red")
        assert (body["data"], body["method"]) == ([], None)

    @pytest.mark.parametrize("stored", [(), ({"label": "cat", "text": "a cat"},), (image("red"),)])
    async def test_a_set_without_labels_is_begun_with_typical_media(
        self, http: httpx.AsyncClient, stored: tuple[dict[str, Any], ...]
    ) -> None:
        await create(http, *stored)
        body = await suggest(http, "darkred", "tomato", "lime", count=1)
        (entry,) = body["data"]
        assert entry["index"] == 2  # in the middle of the three that are alike
        assert (entry["labels"], entry["reason"]["margin"], entry["reason"]["similarity"]) == ([], None, None)
        assert body["method"] is None

    async def test_one_label_has_no_margin_and_covers_what_is_like_it(self, http: httpx.AsyncClient) -> None:
        await create(http, *examples("red", "darkred", "tomato"))
        body = await suggest(http, "lime", "green", count=1)
        assert ([entry["index"] for entry in body["data"]], body["method"]) == ([1], None)
        assert body["data"][0]["reason"]["margin"] is None

    async def test_vectors_of_uploads_are_kept_and_others_are_not(
        self, http: httpx.AsyncClient, client: FakeClient
    ) -> None:
        await create(http, *examples("red", "tomato", "green", "darkgreen"))
        upload = await http.post("/v1/images", content=png("lime"), headers={"Content-Type": "image/png"})
        pool = [{"image": upload.json()["id"]}, image("blue")]
        for _ in range(2):
            answer = await http.post("/v1/support_sets/pets/suggest", json={"pool": pool})
            assert answer.status_code == 200
        digests = [media.digest for media in client.embedded]
        counts = [digests.count(encoded(png(colour), "image", "").digest) for colour in ("lime", "blue", "red")]
        assert counts == [1, 2, 1]

    @pytest.mark.parametrize(
        ("fields", "status", "param"),
        [
            ({"pool": []}, 400, "pool"),
            ({"pool": [{}]}, 400, "pool[0]"),
            ({"pool": [image("red")] * 1025}, 400, "pool"),
            ({"pool": [image("red")], "count": 0}, 400, "count"),
            ({"pool": [image("red"), {"image": "img_0"}]}, 404, "pool[1].image"),
            ({"pool": [image("red"), {"image": "data:image/png;base64,!"}]}, 400, "pool[1].image"),
            ({"pool": [{"media": [{"type": "image_id", "image_id": "img_0"}]}]}, 404, "pool[0].media[0].image_id"),
            ({"pool": [image("red")], "label": "cat"}, 422, "label"),
            ({"pool": [image("red")], "version": 2}, 404, "version"),
        ],
    )
    async def test_an_error_names_the_field(
        self, http: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str
    ) -> None:
        await create(http, *examples(*LABELS))
        answer = await http.post("/v1/support_sets/pets/suggest", json=fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
