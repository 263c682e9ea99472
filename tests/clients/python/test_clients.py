"""Making and closing clients of both kinds: wrong keys and URLs are refused at once, and connections do not stay open."""

from __future__ import annotations

import gc
import re
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from flamboyance_client import AsyncClient, Client, NotConnected, Retries
from flamboyance_client.cli.connection import message_of
from flamboyance_client.connection import shown_url
from tests.clients.python.test_client import fixed


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    "key", ["secret\r\nX: y", "secret\x00", "secr\u00e9t", "\ufeffsecret", "secret\x7f", "secret\ud800"]
)
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(kind: type[Client | AsyncClient], key: str) -> None:
    with pytest.raises(ValueError, match=r"^api_key has a character that no key has; .*printable") as caught:
        kind(api_key=key)
    assert "secr" not in str(caught.value)


def test_a_key_that_is_no_text_is_refused_and_not_shown() -> None:
    with pytest.raises(TypeError, match=r"^api_key is a text or None, not a bytes$"):
        Client(api_key=b"secret")  # type: ignore[arg-type]


def test_a_client_closes_at_the_end_of_its_block() -> None:
    with Client(transport=httpx.MockTransport(fixed(200, {"data": []}))) as client:
        assert isinstance(client, AbstractContextManager)
        assert client.models() == ()
    with pytest.raises(RuntimeError, match="closed"):
        client.models()


def test_a_client_without_a_block_closes_its_connections_when_it_is_collected() -> None:
    class Transport(httpx.MockTransport):
        is_closed = False

        def close(self) -> None:
            self.is_closed = True

    transport = Transport(fixed(200, {"data": []}))
    Client(transport=transport).models()
    gc.collect()
    assert transport.is_closed


@pytest.mark.parametrize("url", ["http://user:pass@127.0.0.1:9", "http://user:p@ss@127.0.0.1:9/v1"])
def test_the_password_of_a_url_is_not_shown(url: str) -> None:
    with Client(url, retries=Retries(limit=0)) as client, pytest.raises(NotConnected) as caught:
        client.models()
    assert str(caught.value).startswith("no connection to http://127.0.0.1:9: ")
    assert message_of(caught.value, url).startswith("no server at http://127.0.0.1:9")
    for wrong in (url.removeprefix("http:"), url.removeprefix("http://"), url.replace(":9", ":9x")):
        with pytest.raises(ValueError, match="is not the URL of a server") as refused:
            Client(wrong)
        assert not any(part in str(refused.value) for part in ("user", "ss@"))


def test_a_url_is_shown_as_it_is_otherwise() -> None:
    for url in ("http://host", "https://host:80/a@b/v1", "host", "//host/a@b", ""):
        assert shown_url(url) == url


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("url", ["127.0.0.1:18234", "foo", "localhost:8000", "", "ftp://host", "http://", "http://a:b"])
def test_a_wrong_url_is_refused_when_the_client_is_made(kind: type[Client | AsyncClient], url: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(repr(url))} is not the URL of a server: .*(begin it|port)"):
        kind(url)


def test_a_url_with_a_query_is_refused() -> None:
    for end in ("?a=b", "/v1?a=b", "#part"):
        with pytest.raises(ValueError, match=r"leave out what begins with \? or #"):
            Client(f"http://127.0.0.1:8000{end}")


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("name", ["missing.pem", "empty.pem"])
def test_certificates_that_cannot_be_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Client | AsyncClient], name: str
) -> None:
    (tmp_path / "empty.pem").touch()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / name))
    with pytest.raises(OSError, match=rf"^SSL_CERT_FILE is '.*/{name}', of which no certificates can be read: "):
        kind("http://127.0.0.1:1")
