"""Tests of what the clients say of a proxy that does not run or that refuses, and of one that is not used."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import httpx
import pytest

from flamboyance_client import AsyncClient, Client, NotConnected, Retries

# an address that no machine has
SERVER = "192.0.2.1:8000"
DEAD = "127.0.0.1:9"
VARIABLES = [
    name for scheme in ("http", "https", "all", "no") for name in (f"{scheme}_proxy", f"{scheme}_PROXY".upper())
]
Models = Callable[[str], object]


class Refusing(BaseHTTPRequestHandler):
    """A proxy that opens no tunnels."""

    def do_CONNECT(self) -> None:
        self.send_error(403, "Not allowed")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def refusing() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def blocking(url: str) -> object:
    with Client(url, retries=Retries(limit=0)) as client:
        return client.models()


def asynchronous(url: str) -> object:
    async def run() -> object:
        async with AsyncClient(url, retries=Retries(limit=0)) as client:
            return await client.models()

    return asyncio.run(run())


@pytest.mark.parametrize("models", [blocking, asynchronous])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_does_not_run_is_named(models: Models, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{scheme}_proxy", f"http://user:secret@{DEAD}")
    with pytest.raises(NotConnected) as caught:
        models(f"{scheme}://{SERVER}")
    text = str(caught.value)
    assert text.startswith(f"no connection to {scheme}://{SERVER}: ")
    assert f"The request goes through the proxy {DEAD}: HTTP_PROXY, HTTPS_PROXY or ALL_PROXY sets it" in text
    assert "Is a server running" not in text
    assert "secret" not in text


@pytest.mark.parametrize("models", [blocking, asynchronous])
def test_a_proxy_that_refuses_is_named(models: Models, refusing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", f"http://{refusing}")
    with pytest.raises(NotConnected, match=rf"no connection to https://{SERVER}: 403 Not allowed\. .*proxy {refusing}"):
        models(f"https://{SERVER}")


@pytest.mark.parametrize("models", [blocking, asynchronous])
def test_a_proxy_that_is_not_used_is_not_named(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:10")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(NotConnected, match=r"Is a server running there\?"):
        models(f"http://{DEAD}")
    with (
        Client(f"http://{DEAD}", transport=httpx.HTTPTransport(), retries=Retries(limit=0)) as client,
        pytest.raises(NotConnected, match=r"Is a server running there\?"),
    ):
        client.models()
