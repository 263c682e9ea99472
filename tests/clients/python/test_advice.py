"""Tests that errors say what to do, with the codes of the server and with the address that was tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from flamboyance_client import ApiError, Client, NotConnected, Retries, TimedOut, UnexpectedReply
from flamboyance_client.advice import ADVICE, OF_ROUTES
from server.openapi import document
from tests.server.test_docs import API, names, rows, section


def send(reply: httpx.Response | Exception) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        if isinstance(reply, Exception):
            raise reply
        return reply

    transport = httpx.MockTransport(handle)
    with Client("http://there:81/", transport=transport, retries=Retries(limit=0)) as client:
        client.models()


@pytest.mark.parametrize("code", ADVICE)
def test_advice_is_for_a_code_of_the_server(code: str) -> None:
    documented = {names(row[1])[0]: int(row[0]) for row in rows(section(API, "Errors")) if row[0].isdigit()}
    with pytest.raises(ApiError) as caught:
        send(httpx.Response(documented[code], json={"error": {"message": "no", "code": code}}))
    end = "" if ADVICE[code].endswith("?") else "."
    assert str(caught.value) == f"{documented[code]}: no. {ADVICE[code]}{end}"
    assert caught.value.message == "no"


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (401, "401: no. Client(api_key=...) takes a key of this server."),
        (503, "503: no. Try again later."),
        (500, "500: no. The server's log has the cause."),
        (400, "400: no"),
        (403, "403: no"),
    ],
)
def test_a_status_without_a_code_has_general_advice(status: int, text: str) -> None:
    with pytest.raises(ApiError) as caught:
        send(httpx.Response(status, json={"error": "no"}))
    assert str(caught.value) == text


@pytest.mark.parametrize("message", ["the body has 9 bytes or more, the limit is 8", "... is 8 (max_import_mb)"])
def test_the_limit_of_an_archive_has_a_setting_of_its_own(message: str, tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(b"PK")
    error = {"error": {"message": message, "code": "body_too_large"}}
    with (
        Client(transport=httpx.MockTransport(lambda request: httpx.Response(413, json=error))) as client,
        pytest.raises(ApiError) as caught,
    ):
        client.support_sets.import_(tmp_path / "set.zip")
    end = "Import a smaller archive, or raise the server's setting max_import_mb."
    assert str(caught.value) == f"413: {message}. {end}"


@pytest.mark.parametrize(("path", "code"), OF_ROUTES)
def test_advice_for_a_route_is_for_one_of_its_errors(path: str, code: str) -> None:
    responses = document()["paths"][path]["post"]["responses"]
    assert any(f"`{code}`" in response["description"] for response in responses.values())


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (
            {"question": "What?"},
            'unknown option question: it is a part of the query, such as {"image": "cat.jpg", "quest',
        ),
        ({"k": 4}, 'unknown option k: it is a part of examples, such as examples={"support_set": "pets", "k": ...}'),
        ({"max_token": 4}, "unknown option max_token; did you mean max_tokens?"),
    ],
)
def test_an_option_of_another_part_of_a_request_is_explained(options: dict[str, Any], advice: str) -> None:
    with Client() as client, pytest.raises(TypeError) as caught:
        client.fewshot.complete(b"GIF89a", **options)
    assert str(caught.value).startswith(advice)


def test_the_address_and_the_key_may_be_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str | None]] = []

    def reply(request: httpx.Request) -> httpx.Response:
        seen.append((str(request.url), request.headers.get("Authorization")))
        return httpx.Response(404, json={"error": "no"})

    monkeypatch.setenv("FLAMBOYANCE_API_KEY", "secret")
    for variable, address, key in (
        ("http://example.test:8311", None, None),
        ("http://example.test:8311", "http://other.test", "mine"),
        ("", None, None),
    ):
        monkeypatch.setenv("FLAMBOYANCE_URL", variable)
        with Client(address, api_key=key, transport=httpx.MockTransport(reply)) as client, pytest.raises(ApiError):
            client.support_sets.get("pets")
    assert [(url.partition("/v1")[0], header) for url, header in seen] == [
        ("http://example.test:8311", "Bearer secret"),
        ("http://other.test", "Bearer mine"),
        ("http://127.0.0.1:8000", "Bearer secret"),
    ]


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    file = tmp_path / "make.py"
    file.write_text("print()")
    with Client() as client, pytest.raises(ValueError, match=r"make\.py is not an image or a video"):
        client.fewshot.complete(file)


def test_a_server_that_does_not_answer_is_named_with_its_address() -> None:
    with pytest.raises(NotConnected, match=r'no connection to http://there:81: refused\. Is a server .*Client\("http'):
        send(httpx.ConnectError("refused"))
    with pytest.raises(
        TimedOut, match=r"no reply from http://there:81 in time: ReadTimeout\. Client\(timeout=\.\.\.\)"
    ):
        send(httpx.ReadTimeout(""))
    with pytest.raises(UnexpectedReply, match=r"expected JSON, got b'<html>'\. Is this the address of a Flamboyance"):
        send(httpx.Response(200, content=b"<html>"))
    with pytest.raises(
        UnexpectedReply, match=r"the status 201 was not expected, with b'<html>'\. Is this the address of a Fla"
    ):
        send(httpx.Response(201, content=b"<html>"))
