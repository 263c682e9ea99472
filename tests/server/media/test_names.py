"""Tests of names that clients give to media: what a name stands for, what is kept, and for how long."""

from __future__ import annotations

import asyncio
from unittest.mock import create_autospec

import httpx
import pytest

from server.errors import MediaNameTaken, NamedMediaNotFound
from server.media import names
from server.media.names import MediaNames
from server.media.pool import DecodePool
from server.media.source import EncodedMedia, encoded
from server.settings import Settings
from tests.server.conftest import image_part, png
from tests.server.fakes import CONFIG, FakeClient

pytestmark = pytest.mark.anyio
RED, BLUE = png("red"), png("blue")


def image(data: bytes) -> EncodedMedia:
    return encoded(data, "image", "here")


def text(value: str) -> dict[str, object]:
    return {"type": "text", "text": value}


async def test_a_name_finds_its_media_at_another_path() -> None:
    named = MediaNames(1000, create_autospec(DecodePool))
    await named.keep("a", image(RED), "p")
    media = named.find("a", "image", "there")
    assert (media.data, media.digest, media.param) == (RED, image(RED).digest, "there")
    with pytest.raises(NamedMediaNotFound) as caught:
        named.find("a", "video", "there.uuid")
    assert caught.value.param == "there.uuid"


async def test_the_data_used_last_are_kept() -> None:
    named = MediaNames(3, create_autospec(DecodePool))
    for name in "abc":
        await named.keep(name, image(name.encode()), "p")
    named.find("a", "image", "p")
    await named.keep("d", image(b"d"), "p")
    assert [_is_kept(named, name) for name in "abcd"] == [True, False, True, True]
    await named.keep("large", image(b"12345"), "p")
    assert [_is_kept(named, name) for name in ["a", "large"]] == [True, False]
    await named.keep("b", image(b"b"), "p")
    assert _is_kept(named, "b")


def _is_kept(named: MediaNames, name: str) -> bool:
    try:
        named.find(name, "image", "p")
    except NamedMediaNotFound:
        return False
    return True


async def test_a_name_refuses_other_data_also_after_its_own_were_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MAX_NAMES", 2)
    named = MediaNames(1, create_autospec(DecodePool))
    await named.keep("a", image(b"1"), "p")
    await named.keep("a", image(b"1"), "p")
    await named.keep("b", image(b"2"), "p")
    with pytest.raises(MediaNameTaken) as caught:
        await named.keep("a", image(b"3"), "p.uuid")
    assert caught.value.param == "p.uuid"
    await named.keep("c", image(b"3"), "p")
    await named.keep("a", image(b"3"), "p")  # one of three names was forgotten
    assert named.find("a", "image", "p").data == b"3"


async def test_the_tenant_that_has_most_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MAX_NAMES", 4)
    named = MediaNames(3, create_autospec(DecodePool))
    await named.keep("a", image(b"1"), "p", "acme")
    for name in "abcdef":
        await named.keep(name, image(name.encode()), "p", "other")
    assert named.find("a", "image", "p", "acme").data == b"1"
    assert named.find("f", "image", "p", "other").data == b"f"
    with pytest.raises(NamedMediaNotFound):
        named.find("d", "image", "p", "other")
    with pytest.raises(MediaNameTaken):  # its name is not forgotten either
        await named.keep("a", image(b"2"), "p", "acme")


async def test_bytes_that_are_no_image_take_no_name(settings: Settings) -> None:
    decoder = DecodePool(CONFIG.vision, settings)
    named = MediaNames(10_000, decoder)
    await named.keep("a", image(b"no image"), "p")
    await named.keep("a", image(RED), "p")
    assert named.find("a", "image", "p").data == RED
    with pytest.raises(MediaNameTaken):
        await named.keep("a", image(BLUE), "p")
    await decoder.stop()


async def test_of_two_data_at_once_one_has_the_name(settings: Settings) -> None:
    decoder = DecodePool(CONFIG.vision, settings)
    named = MediaNames(10_000, decoder)
    await named.keep("a", image(b"no image"), "p")
    media = [image(RED), image(BLUE)]
    errors = await asyncio.gather(*(named.keep("a", item, "p") for item in media), return_exceptions=True)
    (kept,) = [item for item, error in zip(media, errors, strict=True) if error is None]
    assert sum(isinstance(error, MediaNameTaken) for error in errors) == 1
    assert named.find("a", "image", "p").data == kept.data
    await decoder.stop()


@pytest.mark.parametrize("alone", [{"image_url": None}, {}])
async def test_a_part_with_a_name_alone_shows_what_was_sent(
    http: httpx.AsyncClient, client: FakeClient, alone: dict[str, object]
) -> None:
    named = {"type": "image_url", "uuid": "https://a.example/cat.png", **alone}
    both = [named, text("x"), {**image_part(RED), "uuid": named["uuid"]}, text("y")]
    assert (await http.post("/v1/completions", json={"prompt": both})).status_code == 200
    messages = [{"role": "user", "content": [named, text("What?")]}]
    assert (await http.post("/v1/chat/completions", json={"messages": messages})).status_code == 200
    digest = image(RED).digest
    assert [request.prompt.media for request in client.requests] == [[digest, digest], [digest]]
    assert client.media[1][digest].data == RED


async def test_a_name_of_broken_bytes_is_given_to_the_image_that_replaces_them(http: httpx.AsyncClient) -> None:
    for data, status in [(b"no image", 200), (RED, 200), (BLUE, 409)]:  # the scripted engine decodes nothing
        response = await http.post("/v1/completions", json={"prompt": [{**image_part(data), "uuid": "a"}]})
        assert response.status_code == status


@pytest.mark.parametrize("route", ["completions", "embeddings"])
async def test_errors_name_the_uuid(http: httpx.AsyncClient, client: FakeClient, route: str) -> None:
    field = "prompt" if route == "completions" else "input"

    async def error(part: dict[str, object]) -> tuple[int, str, str]:
        response = await http.post(f"/v1/{route}", json={field: [part]})
        error = response.json()["error"]
        return response.status_code, error["code"], error["param"]

    unknown: dict[str, object] = {"type": "image_url", "uuid": "unknown"}
    assert await error(unknown) == (404, "media_not_found", f"{field}[0].uuid")
    assert (await http.post(f"/v1/{route}", json={field: [{**image_part(RED), "uuid": "a"}]})).status_code == 200
    assert await error({**image_part(BLUE), "uuid": "a"}) == (409, "media_name_taken", f"{field}[0].uuid")
    assert await error({"type": "video_url", "uuid": "a"}) == (404, "media_not_found", f"{field}[0].uuid")
    assert await error({"type": "image_url"}) == (400, "invalid_value", f"{field}[0]")
    assert await error({**image_part(RED), "uuid": ""}) == (400, "invalid_value", f"{field}[0].uuid")
    assert await error({**image_part(RED), "uuid": "x" * 513}) == (400, "invalid_value", f"{field}[0].uuid")


async def test_a_named_image_becomes_an_example(http: httpx.AsyncClient) -> None:
    sent = {"media": [{**image_part(RED), "uuid": "a"}], "label": "red"}
    again = {"media": [{"type": "image_url", "uuid": "a"}], "label": "also red"}
    response = await http.post("/v1/support_sets", json={"examples": [sent, again]})
    assert response.status_code == 200, response.text
    examples = (await http.get(f"/v1/support_sets/{response.json()['id']}/examples")).json()["data"]
    assert [example["media"][0]["image_id"] for example in examples] == [image(RED).id] * 2
