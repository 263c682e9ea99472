"""The address that httpx connects to for a request, as its trace shows: the server's, or that of a proxy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

PORTS = {"http": 80, "https": 443}
KEY = "flamboyance_client"


class Trace:
    """Records the last address to which a request has opened a connection; None without a new connection."""

    address: tuple[str, int] | None = None

    def record(self, event: str, fields: Mapping[str, Any]) -> None:
        if event.endswith("connect_tcp.started"):
            self.address = fields["host"], fields["port"]

    async def record_async(self, event: str, fields: Mapping[str, Any]) -> None:
        self.record(event, fields)


def trace(request: httpx.Request) -> None:
    """Trace a request, as a hook of an `httpx.Client`."""
    request.extensions[KEY] = of_request = Trace()
    request.extensions["trace"] = of_request.record


async def trace_async(request: httpx.Request) -> None:
    """Trace a request, as a hook of an `httpx.AsyncClient`."""
    request.extensions[KEY] = of_request = Trace()
    request.extensions["trace"] = of_request.record_async


def proxy(request: httpx.Request) -> str | None:
    """Return the host and port of the proxy to which a request has opened a connection, or None if there is none."""
    of_request, url = request.extensions.get(KEY, Trace()), request.url
    if of_request.address in (None, (url.raw_host.decode(), url.port or PORTS[url.scheme])):
        return None
    host, port = of_request.address
    return f"{host}:{port}"
