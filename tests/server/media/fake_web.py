"""A web server on this machine with scripted responses, which records its requests."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

Write = Callable[[bytes], Awaitable[None]]
Page = bytes | Callable[[Write], Awaitable[None]]


def answer(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    """Return a complete response. Underscores in names of headers become dashes."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class Web:
    """A web server. `pages` are responses by path, or functions that write them.

    `heads` are the heads of all requests; an empty one is a connection without a request.
    """

    pages: dict[str, Page]
    heads: list[str] = field(default_factory=list)
    port: int = 0
    _serving: set[asyncio.Task[None]] = field(default_factory=set)

    @asynccontextmanager
    async def served(self, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> AsyncIterator[Web]:
        server = await asyncio.start_server(self._serve, host, 0, ssl=tls)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self._serving:
                task.cancel()
            await asyncio.gather(*self._serving, return_exceptions=True)
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._answer(reader, writer))
        self._serving.add(task)
        await asyncio.wait({task})

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii")
            self.heads.append(head)
            page = self.pages[head.split()[1]]

            async def write(data: bytes) -> None:
                writer.write(data)
                await writer.drain()

            await (write(page) if isinstance(page, bytes) else page(write))
        except (asyncio.IncompleteReadError, ConnectionError):
            self.heads.append("")
        finally:
            writer.close()

    @property
    def paths(self) -> list[str]:
        return [head.split()[1] for head in self.heads]

    def headers(self, index: int = 0) -> dict[str, str]:
        lines = self.heads[index].strip().split("\r\n")[1:]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
