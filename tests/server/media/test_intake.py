"""Media of requests over HTTP: fetched, stored and inline ones in a prompt, and their common limits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import create_autospec

import httpx
import pytest

from server.app import create_app
from server.errors import InvalidMedia, InvalidRequest, MediaNotFetched, MediaNotFound
from server.media.intake import Intake
from server.media.pool import DecodePool
from server.media.source import EncodedMedia, encoded, read_data_url
from server.media.store import MediaStore
from server.schemas.prompt import ImageIdPart, ImageUrlPart
from server.settings import Settings
from server.telemetry.metrics import Metrics
from tests.server.conftest import data_url, png
from tests.server.documented import CHECKED
from tests.server.fakes import FakeClient, served_model
from tests.server.media.fake_web import Web, Write, answer

pytestmark = pytest.mark.anyio
RED, BLUE = png("red"), png("blue")


@pytest.fixture
async def web() -> AsyncIterator[Web]:
    async with Web({"/red.png": answer(RED), "/blue.png": answer(BLUE)}).served() as web:
        yield web


@pytest.fixture
def settings(settings: Settings, web: Web) -> Settings:
    fields = {
        "media_url_hosts": "127.0.0.1",
        "media_url_ports": str(web.port),
        "media_url_http": True,
        "media_url_networks": "127.0.0.0/8",
    }
    return settings.model_copy(update=fields)


@pytest.fixture
def intake(settings: Settings, tmp_path: Any) -> Intake:
    return Intake(settings, MediaStore(str(tmp_path / "media")), create_autospec(DecodePool))


def url_part(web: Web, path: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{web.port}{path}"}}


async def complete(http: httpx.AsyncClient, *parts: dict[str, Any]) -> httpx.Response:
    return await http.post("/v1/completions", json={"prompt": [*parts, {"type": "text", "text": "x"}]})


async def test_large_data_are_decoded_while_the_loop_runs(intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
    decoders: list[threading.Thread] = []

    def decode(*arguments: Any, **options: Any) -> EncodedMedia:
        decoders.append(threading.current_thread())
        return read_data_url(*arguments, **options)

    monkeypatch.setattr("server.media.intake.read_data_url", decode)
    data = RED + bytes(2**16)
    assert (await intake.read_url(data_url(data), "image", "prompt")).data == data
    await intake.read_url(data_url(RED), "image", "prompt")
    assert [thread is threading.main_thread() for thread in decoders] == [False, True]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://a", "picture.png", "datas:;base64,eA==", ""])
async def test_a_url_of_another_scheme_is_refused_with_those_that_are_read(intake: Intake, url: str) -> None:
    accepted = r"a data URL \(data:video/...;base64,...\) or an https URL of a host in media_url_hosts"
    with pytest.raises(
        InvalidRequest, match=f"^the video must be {accepted}; the server reads no files by name$"
    ) as refusal:
        await intake.read_url(url, "video", "url")
    assert refusal.value.param == "url"


@pytest.mark.parametrize("scheme", ["data", "DATA"])
async def test_the_scheme_of_a_data_url_may_have_capitals(intake: Intake, scheme: str) -> None:
    media = await intake.read_url(f"{scheme}:image/png;base64,eA==", "image", "url")
    assert media.data == b"x"


async def test_fetched_media_equal_inline_media(http: httpx.AsyncClient, client: FakeClient, web: Web) -> None:
    sent = {"type": "image_url", "image_url": {"url": data_url(RED)}}
    response = await complete(http, url_part(web, "/red.png"), url_part(web, "/blue.png"), sent)
    assert response.status_code == 200, response.text
    request = client.requests[0]
    assert request.prompt.media == [encoded(data, "image", "").digest for data in (RED, BLUE, RED)]
    assert {digest: media.data for digest, media in client.media[0].items()} == {
        encoded(data, "image", "").digest: data for data in (RED, BLUE)
    }


async def test_the_error_for_a_bad_url_names_its_path(http: httpx.AsyncClient, web: Web) -> None:
    web.pages["/missing"] = answer(b"", "404 Not Found")
    error = (await complete(http, url_part(web, "/red.png"), url_part(web, "/missing"))).json()["error"]
    assert (error["code"], error["param"]) == ("media_not_fetched", "prompt[1].image_url.url")
    other = {"type": "image_url", "image_url": {"url": "http://evil.example/?key=secret"}}
    response = await complete(http, other)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "media_url_refused"
    assert "secret" not in response.text


async def test_an_upload_may_be_a_url(http: httpx.AsyncClient, web: Web) -> None:
    url = url_part(web, "/red.png")["image_url"]["url"]
    assert (await http.post("/v1/images", json={"url": url})).json()["id"] == encoded(RED, "image", "").id
    metrics = (await http.get("/metrics")).text
    assert 'media_fetch_seconds_count{model_name="tiny"} 1.0' in metrics


async def test_nothing_is_fetched_unless_hosts_are_listed(settings: Settings, web: Web) -> None:
    app = create_app(FakeClient(), served_model(), settings.model_copy(update={"media_url_hosts": None}), Metrics("x"))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://localhost", event_hooks=CHECKED
    ) as http:
        response = await complete(http, url_part(web, "/red.png"))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        422,
        "unsupported_parameter",
        "prompt[0].image_url.url",
    )
    assert "media_url_hosts" in error["message"]
    assert web.heads == []


async def test_the_media_of_a_prompt_are_fetched_concurrently(intake: Intake, web: Web) -> None:
    both = asyncio.Barrier(2)

    async def meet(write: Write) -> None:
        await both.wait()
        await write(answer(RED))

    web.pages |= {"/1": meet, "/2": meet}
    parts = {path: ImageUrlPart.model_validate(url_part(web, path)) for path in ("/1", "/2")}
    async with asyncio.timeout(20):
        media = await intake.read_all(parts, "prompt")
    assert [item.data for item in media.values()] == [RED, RED]


async def test_equal_media_of_a_prompt_are_one_that_names_the_first(intake: Intake) -> None:
    parts = {
        f"p[{number}]": ImageUrlPart.model_validate({"type": "image_url", "image_url": {"url": data_url(data)}})
        for number, data in enumerate([RED, BLUE, RED])
    }
    first, other, last = (await intake.read_all(parts, "prompt")).values()
    assert first is last
    assert (first.param, other.param) == ("p[0].image_url.url", "p[1].image_url.url")


async def test_the_first_error_is_raised_and_the_rest_is_cancelled(intake: Intake, web: Web) -> None:
    cancelled = asyncio.Event()

    async def forever(write: Write) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    web.pages |= {"/missing": answer(b"", "404 Not Found"), "/slow": forever}
    parts = {path: ImageUrlPart.model_validate(url_part(web, path)) for path in ("/missing", "/slow")}
    started = asyncio.get_running_loop().time()
    with pytest.raises(MediaNotFetched) as caught:
        await intake.read_all(parts, "prompt")
    assert caught.value.param == "/missing.image_url.url"
    assert asyncio.get_running_loop().time() - started < intake.settings.media_url_idle_timeout


async def test_the_media_of_a_prompt_share_a_limit(settings: Settings, tmp_path: Any, web: Web) -> None:
    store = MediaStore(str(tmp_path / "media"))
    half = int(settings.max_body_bytes * 0.4)
    assert half < settings.max_media_bytes
    web.pages |= {f"/{i}": answer(RED + bytes([i]) * half) for i in range(3)}
    parts = {f"p[{i}]": ImageUrlPart.model_validate(url_part(web, f"/{i}")) for i in range(3)}
    intake = Intake(settings, store, create_autospec(DecodePool))
    with pytest.raises(InvalidMedia, match=r"^the media of the request have [0-9,]+ bytes, .* \(max_body_mb\)$"):
        await intake.read_all(parts, "prompt")
    del parts["p[2]"]
    assert len(await intake.read_all(parts, "prompt")) == 2
    # repeated media and stored media do not count
    parts["p[2]"] = parts["p[1]"]
    assert len(await intake.read_all(parts, "prompt")) == 3
    stored = ImageIdPart(type="image_id", image_id=store.put(bytes(half), "image"))
    media = await intake.read_all({**dict(list(parts.items())[:2]), "p[9]": stored}, "prompt")
    assert [item.is_in_memory for item in media.values()] == [True, True, False]


@pytest.mark.parametrize("url", [None, "memory://examples"])
async def test_media_of_examples_are_read_on_first_use(settings: Settings, intake: Intake, url: str | None) -> None:
    """A request with 32 shots that the worker knows makes no access to the store, which may be far away."""
    if url is not None:
        intake = Intake(settings, MediaStore(url), create_autospec(DecodePool))
    names = [intake.store.put(RED + bytes([number]), "image") for number in (2, 0, 1)]
    missing = "vid_" + 64 * "0"
    media = intake.refer_all(names, "examples")
    assert [(item.id, item.param, item.is_stored) for item in media] == [(name, "examples", True) for name in names]
    assert [item.data for item in media] == [RED + bytes([number]) for number in (2, 0, 1)]
    (lost,) = intake.refer_all([missing], "examples")
    with pytest.raises(MediaNotFound, match=missing) as caught:
        _ = lost.data
    assert (lost.kind, caught.value.param) == ("video", "examples")


async def test_the_media_of_examples_are_limited(intake: Intake) -> None:
    too_many = intake.settings.max_media_per_request + 1
    with pytest.raises(InvalidRequest, match=f"{too_many} images and videos in one request"):
        intake.refer_all(["img_" + 64 * "0"] * too_many, "examples")
