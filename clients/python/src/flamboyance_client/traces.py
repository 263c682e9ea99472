"""The connections that httpx opens for requests, as its traces show: their addresses, and sockets that can be ended."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from socket import SHUT_RDWR, socket
from typing import Any
from weakref import ref

import httpx

# the events of httpx's trace that yield a stream with a socket
OPENED = ("connect_tcp.complete", "start_tls.complete")
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


class TracedClient(httpx.Client):
    """An httpx client that traces its requests, and whose requests can be ended from another thread."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(event_hooks={"request": [self._trace]}, **settings)
        self._sockets: set[ref[socket]] = set()

    def end_requests(self) -> None:
        """End all connections, so that threads that wait for replies get an error: closing them would not wake a thread."""
        for opened in self._sockets.copy():
            if (connected := opened()) is not None:
                with suppress(OSError):
                    # a TLS socket's own method changes what another thread is reading
                    socket.shutdown(connected, SHUT_RDWR)

    def _trace(self, request: httpx.Request) -> None:
        request.extensions[KEY] = of_request = Trace()

        def record(event: str, fields: Mapping[str, Any]) -> None:
            of_request.record(event, fields)
            if event.endswith(OPENED):
                opened = fields["return_value"].get_extra_info("socket")
                self._sockets.add(ref(opened, self._sockets.discard))

        request.extensions["trace"] = record


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
