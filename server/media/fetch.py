"""Fetching media by URL, which is off until hosts are named: a request must not make the server talk to its neighbours.

A name is resolved once, every address that it has must be allowed, and one of these is what is connected to; the name
stays in the Host header and in the certificate's check. A redirect is a new URL, checked like the first.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from ipaddress import ip_address

import httpx

from model.media import MediaError, media_type_of
from server.errors import MediaNotFetched, MediaUrlRefused
from server.media.addresses import Address, UrlRules, host_of, port_of
from server.media.source import EncodedMedia, Kind, check_size, encoded
from server.settings import Settings

Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]

HEADERS = {"Accept": "image/*, video/*", "Accept-Encoding": "identity", "User-Agent": "flamboyance"}
REDIRECTS = {301, 302, 303, 307, 308}

logger = logging.getLogger(__name__)


async def resolve(host: str, port: int) -> list[Address]:
    """Raises `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ip_address(address[0]) for *_, address in found]


class Fetcher:
    """`took` is told the seconds of each media; `trust`: certificates that count, the system's if none."""

    def __init__(
        self,
        settings: Settings,
        *,
        took: Callable[[float], object] = lambda seconds: None,
        resolve: Resolve = resolve,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        self._settings = settings
        self._took = took
        self._rules = UrlRules.of(settings)
        self._resolve = resolve
        self._slots = asyncio.Semaphore(settings.media_url_concurrency)
        self._trust = trust

    @property
    def is_on(self) -> bool:
        return bool(self._rules.hosts)

    async def fetch(self, url: str, kind: Kind, param: str) -> EncodedMedia:
        """Raises `MediaUrlRefused` for a URL that is not allowed, `MediaNotFetched` for one that leads to nothing,
        `InvalidMedia` for too many bytes."""
        first = self._rules.read(url, param)
        try:
            async with self._slots, asyncio.timeout(self._settings.media_url_timeout):
                started = time.monotonic()
                data = await self._follow(first, kind, param)
                self._took(time.monotonic() - started)
                return encoded(_of_kind(data, kind, param), kind, param)
        except (TimeoutError, httpx.TimeoutException):
            reason = "in time"
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
            logger.info("a media was not fetched", extra={"host": host_of(first), "error": type(error).__name__})
            reason = "from its host"
        raise MediaNotFetched(f"the {kind} could not be fetched {reason}", param=param)

    async def _follow(self, url: httpx.URL, kind: Kind, param: str) -> bytes:
        for _ in range(self._settings.media_url_redirects + 1):
            async with aclosing(self._transport()) as transport:
                response = await transport.handle_async_request(await self._request(url, param))
                async with aclosing(response):
                    if response.status_code not in REDIRECTS:
                        return await self._body(response, kind, param)
                    url = self._rules.read(str(url.join(response.headers.get("location", ""))), param)
        raise MediaNotFetched(f"the {kind}'s URL leads to another URL, which is not followed", param=param)

    def _transport(self) -> httpx.AsyncHTTPTransport:
        # one for each connection, which was made for one name; a bare transport has no cookies, proxies or redirects
        self._trust = self._trust or ssl.create_default_context()
        return httpx.AsyncHTTPTransport(verify=self._trust, trust_env=False, http2=False, retries=0)

    async def _request(self, url: httpx.URL, param: str) -> httpx.Request:
        """To an address that was checked, under the name that was asked for."""
        addresses = await self._resolve(host_of(url), port_of(url))
        if not addresses or not all(map(self._rules.allows, addresses)):
            raise MediaUrlRefused("this server does not fetch from where the URL's host leads", param=param)
        idle = self._settings.media_url_idle_timeout
        return httpx.Request(
            "GET",
            url.copy_with(host=str(addresses[0]), fragment=None),
            headers={**HEADERS, "Host": url.netloc.decode("ascii")},
            extensions={"sni_hostname": host_of(url), "timeout": httpx.Timeout(idle).as_dict()},
        )

    async def _body(self, response: httpx.Response, kind: Kind, param: str) -> bytes:
        if response.status_code != httpx.codes.OK:
            raise MediaNotFetched(f"the {kind}'s host answered {response.status_code}", param=param)
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            # a small body could become a large one
            raise MediaNotFetched(f"the {kind}'s host sent it compressed, unasked", param=param)
        limit, data = self._settings.max_media_bytes, bytearray()
        check_size(_length(response), limit, param)
        async for piece in response.aiter_raw():
            check_size(len(data) + len(piece), limit, param)
            data += piece
        return bytes(data)


def _of_kind(data: bytes, kind: Kind, param: str) -> bytes:
    """By its first bytes, whatever the host calls it: a page of an inner service never gets further than this."""
    with suppress(MediaError):
        if media_type_of(data).startswith(f"{kind}/"):
            return data
    raise MediaNotFetched(f"what the URL leads to is no {kind} that this server reads", param=param)


def _length(response: httpx.Response) -> int:
    """What the headers promise; the bytes are counted as they come."""
    promised = response.headers.get("content-length", "")
    return int(promised) if promised.isdecimal() else 0
