"""Routes of images: uploads in all forms are decoded, named by content, returned, listed and deleted."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.formparsers import MultiPartParser

from model import heif
from server.api.services import Services
from server.media.source import EncodedMedia, encoded
from server.settings import Settings
from server.store.records import NewExample
from tests.server.api.test_sse import Caller
from tests.server.conftest import data_url, png
from tests.server.fakes import FakeClient
from tests.server.media.videos import film

pytestmark = pytest.mark.anyio
RED = png("red", (20, 10))
RED_ID = encoded(RED, "image", "").id
UNKNOWN_ID = "img_" + "0" * 64
PNG = {"Content-Type": "image/png"}


@pytest.fixture
def services(app: FastAPI) -> Services:
    services: Services = app.state.services
    return services


async def upload(http: httpx.AsyncClient, data: bytes = RED, content_type: str = "image/png") -> dict[str, Any]:
    response = await http.post("/v1/images", content=data, headers={"Content-Type": content_type})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def assert_refused(response: httpx.Response, status: int, code: str, param: str | None) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), error


async def test_the_same_bytes_have_one_id_in_every_form(http: httpx.AsyncClient, services: Services) -> None:
    first = await upload(http)
    assert first["created_at"] > 1_600_000_000
    assert first == {
        "id": RED_ID,
        "object": "image",
        "bytes": len(RED),
        "media_type": "image/png",
        "width": 20,
        "height": 10,
        "frames": 1,
        "created_at": first["created_at"],
    }
    forms: list[dict[str, Any]] = [
        {"content": RED, "headers": PNG},
        {"content": RED, "headers": {"Content-Type": "application/octet-stream"}},
        {"files": {"file": ("a.png", RED, "image/png")}},
        {"files": {"file": RED}},
        {"json": {"data": base64.b64encode(RED).decode()}},
        {"json": {"url": data_url(RED)}},
    ]
    for form in forms:
        response = await http.post("/v1/images", **form)
        assert (response.status_code, response.json()) == (200, first), form
    assert list(services.media_store.names()) == [RED_ID]
    assert "media_stored_total{" in (metrics := services.metrics.expose().decode())
    assert 'media_stored_total{model_name="tiny"} 1.0' in metrics


async def test_a_form_needs_no_temporary_file(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MultiPartParser, "spool_max_size", 10)
    monkeypatch.setattr(tempfile, "tempdir", "/a folder that does not exist")
    assert (await http.post("/v1/images", files={"file": RED})).status_code == 200


@pytest.mark.parametrize("form", ["raw", "form", "data", "url"])
async def test_a_video_is_recognised_by_its_bytes(http: httpx.AsyncClient, form: str) -> None:
    data = film(["red", "lime", "blue"])
    letters = base64.b64encode(data).decode()
    bodies: dict[str, dict[str, Any]] = {
        "raw": {"content": data, "headers": {"Content-Type": "video/mp4"}},
        "form": {"files": {"file": ("a.mp4", data, "video/mp4")}},
        "data": {"json": {"data": letters}},
        "url": {"json": {"url": f"data:video/mp4;base64,{letters}"}},
    }
    answer = (await http.post("/v1/images", **bodies[form])).json()
    assert answer["id"] == encoded(data, "video", "").id
    assert (answer["object"], answer["media_type"], answer["frames"]) == ("video", "video/mp4", 3)
    assert (answer["width"], answer["height"]) == (32, 32)


BAD: list[tuple[str, dict[str, Any], int, str, str | None]] = [
    ("cut off", {"content": RED[:40], "headers": PNG}, 400, "invalid_media", "body"),
    ("cut off in a form", {"files": {"file": RED[:40]}}, 400, "invalid_media", "file"),
    ("cut off in JSON", {"json": {"data": base64.b64encode(RED[:40]).decode()}}, 400, "invalid_media", "data"),
    ("cut off in a URL", {"json": {"url": data_url(RED[:40])}}, 400, "invalid_media", "url"),
    (
        "half a video",
        {"content": film(["red"])[:-30], "headers": {"Content-Type": "video/mp4"}},
        400,
        "invalid_media",
        "body",
    ),
    ("nothing", {"content": b"", "headers": PNG}, 400, "invalid_media", "body"),
    (
        "SVG",
        {"content": b"<svg onload='x'/>", "headers": {"Content-Type": "image/svg+xml"}},
        400,
        "invalid_media",
        "body",
    ),
    ("HTML", {"files": {"file": ("a.png", b"<script>", "image/png")}}, 400, "invalid_media", "file"),
    ("image as video", {"content": RED, "headers": {"Content-Type": "video/mp4"}}, 400, "invalid_media", "body"),
    ("video as image", {"files": {"file": ("a", film(["red"]), "image/png")}}, 400, "invalid_media", "file"),
    ("video as image URL", {"json": {"url": data_url(film(["red"]))}}, 400, "invalid_media", "url"),
    ("too many bytes", {"content": RED + bytes(2**17), "headers": PNG}, 400, "invalid_media", "body"),
    ("too many in a form", {"files": {"file": RED + bytes(2**17)}}, 400, "invalid_media", "file"),
    ("too many in JSON", {"json": {"data": base64.b64encode(bytes(2**17 + 1)).decode()}}, 400, "invalid_media", "data"),
    ("body too large", {"content": bytes(2**18 + 1), "headers": PNG}, 413, "body_too_large", None),
    ("form too large", {"files": {"file": bytes(2**18)}}, 413, "body_too_large", None),
    (
        "text",
        {"content": b"hello", "headers": {"Content-Type": "text/plain"}},
        415,
        "unsupported_media_type",
        "Content-Type",
    ),
    ("no type", {"content": RED}, 415, "unsupported_media_type", "Content-Type"),
    ("no base64", {"json": {"data": "%%%"}}, 400, "invalid_media", "data"),
    ("nothing in JSON", {"json": {}}, 400, "invalid_value", None),
    ("both in JSON", {"json": {"data": "YQ==", "url": "data:,"}}, 400, "invalid_value", None),
    ("unknown field", {"json": {"data": "YQ==", "purpose": "vision"}}, 422, "unsupported_parameter", "purpose"),
    ("unknown in a form", {"files": {"file": RED}, "data": {"purpose": "x"}}, 422, "unsupported_parameter", "purpose"),
    ("another name", {"files": {"image": RED}}, 422, "unsupported_parameter", "image"),
    ("two files", {"files": [("file", RED), ("file", RED)]}, 400, "invalid_value", "file"),
    ("text as file", {"files": {"other": ""}, "data": {}}, 422, "unsupported_parameter", "other"),
    ("a form's text", {"data": {"file": "x"}, "files": [("file", (None, "x"))]}, 400, "invalid_value", "file"),
    ("no form", {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "invalid_value", "file"),
    ("a URL", {"json": {"url": "https://a.org/b.png"}}, 422, "unsupported_parameter", "url"),
    ("a file's URL", {"json": {"url": "file:///etc/passwd"}}, 400, "invalid_value", "url"),
]


async def test_bytes_that_curl_declares_as_a_form_are_answered_with_the_header_to_add(http: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    response = await http.post("/v1/images", content=RED, headers=headers)
    assert response.status_code == 415
    assert response.json()["error"]["message"].endswith("; with curl, add -H 'Content-Type: application/octet-stream'")


async def test_a_heic_still_without_the_extra_is_refused_by_its_name(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heif, "is_installed", lambda: False)
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)
    response = await http.post("/v1/images", content=data, headers={"Content-Type": "image/heic"})
    assert_refused(response, 400, "invalid_media", "body")
    assert "the package pillow-heif (the extra heif)" in response.json()["error"]["message"]


@pytest.mark.parametrize(("body", "status", "code", "param"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
async def test_an_error_names_the_invalid_field_and_nothing_is_stored(
    http: httpx.AsyncClient, services: Services, body: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    assert_refused(await http.post("/v1/images", **body), status, code, param)
    assert list(services.media_store.names()) == []


FORM = {"Content-Type": "multipart/form-data; boundary=b"}
BAD_FORMS = {
    "no boundary": {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
    "no parts": {"content": b"x", "headers": FORM},
    "no name": {"content": b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n", "headers": FORM},
    "two files": {"files": [("file", RED), ("file", RED)]},
    "a long text": {"data": {"purpose": "x" * 257}, "files": {"file": RED}},
}


@pytest.mark.parametrize("name", BAD_FORMS)
async def test_a_form_that_cannot_be_read_is_refused_in_our_words(http: httpx.AsyncClient, name: str) -> None:
    response = await http.post("/v1/images", **BAD_FORMS[name])  # type: ignore[arg-type]
    assert_refused(response, 400, "invalid_value", "file")
    assert response.json()["error"]["message"].startswith("the body is not a form with one file, named file")


@pytest.mark.parametrize("charset", ["punycode", "unicode_escape", "utf-7", "undefined", "UTF-8"])
async def test_a_form_in_another_charset_than_utf_8_is_refused_unread(http: httpx.AsyncClient, charset: str) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="\\ud800+2AA-"\r\n\r\nx\r\n--b--\r\n'
    headers = {"Content-Type": f"multipart/form-data; boundary=b; charset={charset}"}
    response = await http.post("/v1/images", content=form, headers=headers)
    assert response.json()["error"]["param"] == ("\\ud800+2AA-" if charset == "UTF-8" else "Content-Type")
    assert response.status_code == (422 if charset == "UTF-8" else 415)


async def test_a_decoder_that_died_while_idle_costs_no_upload(http: httpx.AsyncClient, services: Services) -> None:
    await upload(http, png("blue"))
    for process in services.decoder._processes:
        if process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
    await upload(http)


async def test_an_upload_whose_client_disconnects_is_not_decoded_further(
    app: FastAPI, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def decode(media: EncodedMedia) -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    started, ended = asyncio.Event(), asyncio.Event()
    monkeypatch.setattr(services.decoder, "decode", decode)
    caller = Caller(app, {"url": data_url(RED)}, "/v1/images")
    await started.wait()
    caller.disconnected.set()
    await asyncio.wait_for(ended.wait(), 20)
    await caller.task
    assert not services.media_store.exists(RED_ID)


async def test_a_full_queue_refuses_uploads(http: httpx.AsyncClient, services: Services, settings: Settings) -> None:
    for number in range(settings.max_num_queued):
        services.admission.ticket(f"client {number}").wait()
    assert_refused(await http.post("/v1/images", content=RED, headers=PNG), 503, "overloaded", None)


async def test_an_image_is_returned_with_headers_that_prevent_execution(http: httpx.AsyncClient) -> None:
    card = await upload(http)
    response = await http.get(f"/v1/images/{RED_ID}")
    assert (response.status_code, response.json()) == (200, card)
    content = await http.get(f"/v1/images/{RED_ID}/content")
    assert (content.status_code, content.content) == (200, RED)
    assert content.headers["content-type"] == "image/png"
    assert content.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in content.headers["content-security-policy"]
    assert content.headers["vary"] == "Authorization"  # the same id may be another tenant's
    assert "default-src 'none'" in content.headers["content-security-policy"]
    again = await http.get(f"/v1/images/{RED_ID}/content", headers={"If-None-Match": content.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_head_has_the_status_and_no_body(http: httpx.AsyncClient) -> None:
    await upload(http)
    for path, status in ((RED_ID, 200), (f"{RED_ID}/content", 200), (UNKNOWN_ID, 404), ("x", 404)):
        response = await http.head(f"/v1/images/{path}")
        assert (response.status_code, response.content) == (status, b"")
        assert (await http.get(f"/v1/images/{path}")).headers["content-type"] == response.headers["content-type"]


@pytest.mark.parametrize("name", [UNKNOWN_ID, "x", "img_" + "%2E%2E%2F" * 9, RED_ID.upper()])
async def test_unknown_ids_are_not_found(http: httpx.AsyncClient, name: str) -> None:
    for response in (
        await http.get(f"/v1/images/{name}"),
        await http.get(f"/v1/images/{name}/content"),
        await http.delete(f"/v1/images/{name}"),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["code"] in ("image_not_found", "not_found")


async def test_a_deleted_image_may_be_uploaded_again(http: httpx.AsyncClient) -> None:
    await upload(http)
    response = await http.delete(f"/v1/images/{RED_ID}")
    assert response.json() == {"id": RED_ID, "object": "image", "deleted": True}
    assert_refused(await http.get(f"/v1/images/{RED_ID}"), 404, "image_not_found", "image_id")
    assert_refused(await http.delete(f"/v1/images/{RED_ID}"), 404, "image_not_found", "image_id")
    assert (await upload(http))["id"] == RED_ID


async def test_an_image_whose_file_is_damaged_is_not_found_and_may_be_deleted(
    http: httpx.AsyncClient, settings: Settings
) -> None:
    await upload(http)
    (file,) = Path(settings.media_store_url).glob("img_*/img_*")
    file.write_bytes(b"\x00" * 512)
    assert_refused(await http.get(f"/v1/images/{RED_ID}"), 404, "image_not_found", "image_id")
    assert_refused(await http.get(f"/v1/images/{RED_ID}/content"), 404, "image_not_found", "image_id")
    assert (await http.get("/v1/images")).json()["data"] == []
    assert (await http.delete(f"/v1/images/{RED_ID}")).status_code == 200
    assert (await upload(http))["id"] == RED_ID


async def test_an_image_in_a_support_set_cannot_be_deleted(http: httpx.AsyncClient, services: Services) -> None:
    await upload(http)
    sets, examples = services.support_sets, [NewExample(id="a", media=(encoded(RED, "image", "media"),))]
    support_set = await sets.create("animals", examples)
    assert_refused(await http.delete(f"/v1/images/{RED_ID}"), 409, "image_in_use", None)
    assert (await http.get(f"/v1/images/{RED_ID}/content")).content == RED
    await sets.delete(support_set.id)
    await sets.sweep()  # media that were uploaded by themselves stay
    assert (await http.delete(f"/v1/images/{RED_ID}")).status_code == 200


async def test_media_of_a_support_set_stay_if_they_are_also_uploaded(
    http: httpx.AsyncClient, services: Services
) -> None:
    support_set = await services.support_sets.create("a", [NewExample(id="a", media=(encoded(RED, "image", "m"),))])
    assert (await upload(http))["id"] == RED_ID
    await services.support_sets.delete(support_set.id)
    await services.support_sets.sweep()
    assert (await http.get(f"/v1/images/{RED_ID}")).status_code == 200


async def test_pages_list_each_media_item_once(http: httpx.AsyncClient) -> None:
    names = sorted([(await upload(http, png("red", (10 + i, 10))))["id"] for i in range(7)])
    film_id = (await upload(http, film(["red"]), "video/mp4"))["id"]
    seen, after = [], ""
    while True:
        page = (await http.get("/v1/images", params={"limit": 3, "after": after})).json()
        seen += [card["id"] for card in page["data"]]
        assert (page["object"], page["first_id"], page["last_id"]) == (
            "list",
            seen[len(seen) // 3 * 3 - 3],
            seen[-1],
        ) or (not page["has_more"])
        if not page["has_more"]:
            break
        assert len(page["data"]) == 3
        after = page["last_id"]
    assert seen == [*names, film_id]
    only = (await http.get("/v1/images", params={"object": "video"})).json()
    assert [card["id"] for card in only["data"]] == [film_id]
    empty = (await http.get("/v1/images", params={"after": film_id})).json()
    assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ("limit=0", 400, "limit"),
        ("limit=1001", 400, "limit"),
        *((f"limit={number}", 400, "limit") for number in ("x", "1_0", "5.0", "%205", "%2B5", "-", "٥")),
        ("limit=1&limit=2", 400, "limit"),
        ("object=sound", 422, "object"),
        ("order=desc", 422, "order"),
    ],
)
async def test_an_error_names_the_invalid_query_parameter(
    http: httpx.AsyncClient, query: str, status: int, param: str
) -> None:
    response = await http.get(f"/v1/images?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


# in prompts


async def complete(http: httpx.AsyncClient, *parts: dict[str, Any]) -> httpx.Response:
    return await http.post("/v1/completions", json={"prompt": [*parts, {"type": "text", "text": "x"}]})


async def test_an_id_refers_to_its_media(http: httpx.AsyncClient, client: FakeClient) -> None:
    await upload(http)
    film_id = (await upload(http, film(["red"]), "video/mp4"))["id"]
    by_id = {"type": "image_id", "image_id": RED_ID}
    response = await complete(http, by_id, {"type": "video_id", "video_id": film_id}, by_id)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["fewshot_details"]["media"] == 3
    assert {media.id: media.data for media in client.media[0].values()} == {RED_ID: RED, film_id: film(["red"])}
    await complete(http, {"type": "image_url", "image_url": {"url": data_url(RED)}})
    # the engine receives the same media by id and by URL
    assert (
        client.requests[1].prompt.media[0] == client.requests[0].prompt.media[0] == client.requests[0].prompt.media[2]
    )


async def test_an_error_names_the_part_with_an_unknown_id(http: httpx.AsyncClient) -> None:
    await upload(http)
    known = {"type": "image_id", "image_id": RED_ID}
    for part, param in (
        ({"type": "image_id", "image_id": UNKNOWN_ID}, "prompt[1].image_id"),
        ({"type": "video_id", "video_id": "vid_" + RED_ID[4:]}, "prompt[1].video_id"),
    ):
        assert_refused(await complete(http, known, part), 404, "image_not_found", param)
    response = await complete(http, known, {"type": "video_id", "video_id": RED_ID})
    assert_refused(response, 400, "invalid_value", "prompt[1].video_id")
    assert response.json()["error"]["message"].endswith("' is an id for image_id, not for video_id")


async def test_ids_count_towards_the_media_of_a_prompt(http: httpx.AsyncClient) -> None:
    await upload(http)
    response = await complete(http, *[{"type": "image_id", "image_id": RED_ID}] * 4)
    assert_refused(response, 400, "invalid_value", "prompt")
