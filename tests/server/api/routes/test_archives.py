"""Routes of archives: a set that is exported and imported is the same set, and a failed import leaves nothing."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile, ZipInfo

import httpx
import pytest
from fastapi import FastAPI

from server.api import examples as api_examples
from server.app import create_app
from server.errors import StorageUnavailable
from server.media.source import EncodedMedia
from server.media.turns import Job
from server.schemas.archive import ArchivedMedia
from server.settings import Settings
from server.store.records import NewExample
from server.telemetry.metrics import Metrics
from tests.server.api.routes.test_support_sets import SETS, create, error, example
from tests.server.archives import archive, reference, unpacked
from tests.server.conftest import png
from tests.server.documented import CHECKED
from tests.server.fakes import FakeClient, served_model

pytestmark = pytest.mark.anyio

IMPORT = f"{SETS}/import"
ZIP = {"Content-Type": "application/zip"}
RED = png("red")
EXAMPLE = {"id": "a", "text": "t", "media": [reference(RED)]}
FILES = {"media/a.png": RED}


@pytest.fixture
async def other(settings: Settings, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Another server, with data of its own."""
    app = create_app(
        FakeClient(), served_model(), settings.model_copy(update={"data_dir": tmp_path / "other"}), Metrics("tiny")
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", event_hooks=CHECKED) as client:
        yield client
    await app.state.services.decoder.stop()
    app.state.services.database.close()


async def exported(http: httpx.AsyncClient, name: str = "s", **query: Any) -> bytes:
    response = await http.get(f"{SETS}/{name}/export", params=query)
    assert response.status_code == 200, response.text
    return response.content


async def imported(http: httpx.AsyncClient, data: bytes, **query: Any) -> dict[str, Any]:
    response = await http.post(IMPORT, content=data, headers=ZIP, params=query)
    assert response.status_code == 200, response.text
    card: dict[str, Any] = response.json()
    return card


async def refused(http: httpx.AsyncClient, data: bytes, **query: Any) -> tuple[int, str, str | None]:
    return error(await http.post(IMPORT, content=data, headers=ZIP, params=query))


async def num_stored(http: httpx.AsyncClient) -> tuple[int, int]:
    """Return the numbers of support sets and of stored media."""
    return len((await http.get(SETS)).json()["data"]), len((await http.get("/v1/images")).json()["data"])


async def test_a_set_is_the_same_on_another_server(http: httpx.AsyncClient, other: httpx.AsyncClient) -> None:
    examples = [
        example("a", "red", label="warm", question="?", metadata={"x": [1, None]}),
        example("b", "blue", label="cold"),
        example("c", "red"),
        example("d"),
    ]
    card = await create(http, examples=examples, metadata={"owner": "me"}, pinned=True, ttl_seconds=60)
    copy = await imported(other, await exported(http))
    assert copy["id"] != card["id"]
    assert copy["example_ids"] == ["a", "b", "c", "d"]
    assert (copy["version"], copy["pinned"], copy["expires_at"]) == (1, False, None)
    for field in ("name", "metadata", "num_examples", "num_media", "bytes", "label_counts"):
        assert copy[field] == card[field], field
    pages = [(await server.get(f"{SETS}/s/examples")).json()["data"] for server in (http, other)]
    assert pages[0] == pages[1]
    media = pages[1][0]["media"][0]["image_id"]
    assert (await other.get(f"/v1/images/{media}/content")).content == RED
    described = (await other.get(f"/v1/images/{media}")).json()
    assert (described["width"], described["height"], described["frames"]) == (20, 10, 1)
    files = [unpacked(await exported(server)) for server in (http, other)]
    manifests = [json.loads(content.pop("manifest.json")) for content in files]
    assert files[0] == files[1]
    assert [manifest.pop("exported_from")["support_set"] for manifest in manifests] == [card["id"], copy["id"]]
    assert manifests[0] == manifests[1]


async def test_an_export_is_a_file_to_save(http: httpx.AsyncClient) -> None:
    card = await create(http, "a:b", examples=[example("a")])
    response = await http.get(f"{SETS}/a:b/export")
    assert response.headers["content-type"] == "application/zip"
    assert response.headers["content-disposition"] == 'attachment; filename="a_b-v1.zip"'
    unnamed = (await http.post(SETS, json={})).json()
    response = await http.get(f"{SETS}/{unnamed['id']}/export")
    assert response.headers["content-disposition"] == f'attachment; filename="{unnamed["id"]}-v1.zip"'
    manifest = json.loads(unpacked(await exported(http, card["id"]))["manifest.json"])
    assert manifest["exported_from"] == {"support_set": card["id"], "version": 1}


async def test_any_version_is_exported(http: httpx.AsyncClient) -> None:
    await create(http, examples=[example("a", "red")])
    await http.post(f"{SETS}/s/examples", json={"examples": [example("b", "blue")]})
    await http.delete(f"{SETS}/s/examples/a")
    numbers = [unpacked(await exported(http, version=version)) for version in (1, 2, 3)]
    assert [sum(name.startswith("media/") for name in files) for files in numbers] == [1, 2, 1]
    assert unpacked(await exported(http)) == numbers[2]
    assert error(await http.get(f"{SETS}/s/export", params={"version": 4}))[:2] == (404, "support_set_not_found")
    assert error(await http.get(f"{SETS}/t/export"))[:2] == (404, "support_set_not_found")
    assert error(await http.get(f"{SETS}/s/export", params={"format": "tar"}))[:2] == (422, "unsupported_parameter")


@pytest.mark.parametrize("method", ["describe", "pieces"])
async def test_a_store_that_does_not_work_is_an_ordinary_error(
    method: str, app: FastAPI, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(media_id: str) -> None:
        raise StorageUnavailable("the media store does not work")

    await create(http, examples=[example("a", "red")])
    monkeypatch.setattr(app.state.services.media_store, method, fail)
    assert error(await http.get(f"{SETS}/s/export"))[:2] == (503, "storage_unavailable")


async def test_an_import_may_have_another_name(http: httpx.AsyncClient) -> None:
    data = archive([EXAMPLE], FILES)
    assert (await imported(http, data))["name"] == "s"
    assert await refused(http, data) == (409, "name_taken", "name")
    assert (await imported(http, data, name="t"))["name"] == "t"
    assert await refused(http, data, name="ss_1") == (400, "invalid_value", "name")
    assert await refused(http, data, pinned="true") == (422, "unsupported_parameter", "pinned")


async def test_an_archive_without_a_name_makes_a_set_without_a_name(http: httpx.AsyncClient) -> None:
    data = archive([{"label": "x"}], name=None)
    cards = [await imported(http, data) for _ in range(2)]
    assert [card["name"] for card in cards] == [None, None]
    assert cards[0]["id"] != cards[1]["id"]
    assert cards[0]["example_ids"][0].startswith("ex_")


async def test_the_same_request_again_has_the_first_response(http: httpx.AsyncClient) -> None:
    headers, data = {**ZIP, "Idempotency-Key": "k"}, archive([EXAMPLE], FILES)
    first = await http.post(IMPORT, content=data, headers=headers)
    again = await http.post(IMPORT, content=data, headers=headers)
    assert first.json() == again.json()
    named = await http.post(IMPORT, content=data, headers=headers, params={"name": "t"})
    assert error(named)[:2] == (409, "idempotency_conflict")
    other = await http.post(IMPORT, content=archive([]), headers=headers)
    assert error(other)[:2] == (409, "idempotency_conflict")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"not a ZIP file", (400, "invalid_archive", None)),
        (archive([], format_version=2), (400, "invalid_archive", "format_version")),
        (archive([EXAMPLE], {"media/a.png": png("blue")}), (400, "invalid_archive", "examples[0].media[0]")),
        (
            archive([{"media": [reference(b"no image")]}], {"media/a.png": b"no image"}),
            (400, "invalid_media", "examples[0].media[0]"),
        ),
        (
            archive([{"media": [reference(RED, kind="video")]}], FILES),
            (400, "invalid_media", "examples[0].media[0]"),
        ),
        (
            archive([EXAMPLE, {"media": [reference(b"no image", "media/b")]}], {**FILES, "media/b": b"no image"}),
            (400, "invalid_media", "examples[1].media[0]"),
        ),
    ],
    ids=["no zip", "version", "digest", "no image", "no video", "the second"],
)
async def test_a_refused_archive_leaves_nothing(
    http: httpx.AsyncClient, settings: Settings, data: bytes, expected: tuple[int, str, str | None]
) -> None:
    assert await refused(http, data) == expected
    assert await num_stored(http) == (0, 0)
    assert not [path for path in settings.data_folder.iterdir() if path.name.startswith("tmp")]


async def test_a_taken_name_is_refused_before_media_are_decoded(
    app: FastAPI, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def decode(media: EncodedMedia, job: Job) -> None:
        raise AssertionError

    await create(http)
    monkeypatch.setattr(app.state.services.decoder, "decode", decode)
    assert await refused(http, archive([EXAMPLE], FILES)) == (409, "name_taken", "name")
    assert await num_stored(http) == (1, 0)


async def test_the_event_loop_is_free_while_an_import_builds_its_examples(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive may have so many references that other requests would wait."""
    event_loop, on_event_loop = threading.get_ident(), Counter[str]()

    def record(step: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        on_event_loop[step] += threading.get_ident() == event_loop
        return function(*arguments, **keywords)

    monkeypatch.setattr(api_examples, "NewExample", partial(record, "build", NewExample))
    monkeypatch.setattr(ArchivedMedia, "__hash__", lambda item: record("find", hash, item.file))
    monkeypatch.setattr(EncodedMedia, "id", property(partial(record, "name", vars(EncodedMedia)["id"].fget)))
    examples = [{"text": "t", "media": [reference(RED)] * 50}] * 20
    card = await imported(http, archive(examples, FILES))
    assert (card["num_examples"], card["num_media"]) == (20, 1)
    assert on_event_loop.keys() == {"build", "find", "name"}
    assert on_event_loop["build"] == 0
    assert max(on_event_loop.values()) < 10


async def test_a_media_item_is_unpacked_to_be_checked_decoded_and_stored(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_entry(file: ZipFile, entry: str | ZipInfo) -> IO[bytes]:
        unpacked.append(entry.filename if isinstance(entry, ZipInfo) else entry)
        return open_any(file, entry)

    data, unpacked, open_any = archive([EXAMPLE, {**EXAMPLE, "id": "b"}], FILES), list[str](), ZipFile.open
    monkeypatch.setattr(ZipFile, "open", open_entry)
    await imported(http, data)
    assert unpacked.count("media/a.png") == 3


async def test_a_larger_archive_than_a_body_is_imported_up_to_its_own_limit(
    http: httpx.AsyncClient, settings: Settings
) -> None:
    media = {f"media/{index}.png": png("red", (20, index + 1)) + bytes(100_000) for index in range(4)}
    examples = [{"media": [reference(data, file)]} for file, data in media.items()]
    data = archive(examples, media)
    assert len(data) > settings.max_body_bytes
    card = await imported(http, data)
    assert (card["num_examples"], card["num_media"]) == (4, 4)
    headers = {"Content-Length": str(settings.max_import_bytes + 1), **ZIP}
    assert (await http.post(IMPORT, content=b"", headers=headers)).status_code == 413


async def test_an_archive_over_the_limit_is_refused(app: FastAPI, http: httpx.AsyncClient) -> None:
    services = app.state.services
    limit = services.settings.max_import_bytes
    assert limit > services.settings.max_body_bytes

    async def body() -> AsyncIterator[bytes]:
        while True:
            yield bytes(2**16)

    response = await http.post(IMPORT, content=body(), headers=ZIP)
    assert error(response)[:2] == (413, "body_too_large")
    assert f"the limit is {limit}" in response.json()["error"]["message"]
    assert services.imports.used == 0


async def test_another_type_of_body_is_refused(http: httpx.AsyncClient) -> None:
    response = await http.post(IMPORT, json={})
    assert error(response) == (415, "unsupported_media_type", "Content-Type")
    response = await http.post(
        IMPORT, content=archive([]), headers={"Content-Type": "application/octet-stream; charset=binary"}
    )
    assert response.status_code == 200


async def test_too_many_examples_are_refused(app: FastAPI, settings: Settings) -> None:
    few = create_app(FakeClient(), served_model(), settings.model_copy(update={"max_set_examples": 2}), Metrics("tiny"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(few), base_url="http://localhost") as http:
        assert await refused(http, archive([{"text": "t"}] * 3)) == (400, "too_many_examples", "examples")
    few.state.services.database.close()


async def test_the_pixels_of_an_archive_may_be_those_of_several_requests(settings: Settings) -> None:
    """An archive may hold the media that a client sends in several requests."""
    limited = settings.model_copy(update={"max_request_pixels": 300, "decode_processes": 1})
    app = create_app(FakeClient(), served_model(), limited, Metrics("tiny"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
        sent = await http.post(SETS, json={"examples": [example("a", "red"), example("b", "blue")]})
        assert error(sent)[:2] == (400, "too_many_pixels")
        files = {"media/a.png": RED, "media/b.png": png("blue")}
        examples = [{"media": [reference(data, file)]} for file, data in files.items()]
        assert (await imported(http, archive(examples, files)))["num_media"] == 2
    await app.state.services.decoder.stop()
    app.state.services.database.close()
