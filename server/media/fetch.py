"""Fetches media by URL, only from hosts that the settings allow, so that a request cannot reach internal services.

A name is resolved once, all of its addresses must be allowed, and the connection goes to one of them. The name is still
used in the Host header and to check the certificate. A redirect is checked like the first URL.
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

from model.media import VIDEO_FORMATS, HeifNotInstalled, MediaError, image_formats, media_type_of
from server.errors import MediaNotFetched, MediaUrlRefused
from server.media.addresses import Address, UrlRules, host_of, port_of
from server.media.source import EncodedMedia, Kind, encoded, too_large
from server.settings import Settings

Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]

HEADERS = {"Accept": "image/*, video/*", "Accept-Encoding": "identity", "User-Agent": "flamboyance"}
REDIRECTS = {301, 302, 303, 307, 308}

logger = logging.getLogger(__name__)


async def resolve(host: str, port: int) -> list[Address]:
    """Return the addresses of a host by the system's resolver. Raises `OSError`."""
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ip_address(address[0]) for *_, address in infos]


class Fetcher:
    """Fetches media by URL.

    `observe` receives the seconds of each fetch. `trust` holds the trusted certificates, by default those of the system.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        observe: Callable[[float], object] = lambda seconds: None,
        resolve: Resolve = resolve,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        self._settings = settings
        self._observe = observe
        self._rules = UrlRules.from_settings(settings)
        self._resolve = resolve
        self._slots = asyncio.Semaphore(settings.media_url_concurrency)
        self._trust = trust

    @property
    def is_enabled(self) -> bool:
        return bool(self._rules.hosts)

    async def fetch(self, url: str, kind: Kind, param: str) -> EncodedMedia:
        """Fetch an image or video.

        Raises `MediaUrlRefused` for a URL that is not allowed, `MediaNotFetched` if its host does not send an image or
        video, and `InvalidMedia` for too many bytes.
        """
        first = self._rules.read(url, param)
        try:
            async with self._slots, asyncio.timeout(self._settings.media_url_timeout):
                started = time.monotonic()
                data = await self._follow(first, kind, param)
                self._observe(time.monotonic() - started)
                _check_kind(data, kind, param)
                return encoded(data, kind, param)
        except (TimeoutError, httpx.TimeoutException):
            reason = "in time"
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
            logger.info("media not fetched", extra={"host": host_of(first), "error": type(error).__name__})
            reason = "from its host"
        raise MediaNotFetched(f"the {kind} could not be fetched {reason}", param=param)

    async def _follow(self, url: httpx.URL, kind: Kind, param: str) -> bytes:
        max_redirects = self._settings.media_url_redirects
        for _ in range(max_redirects + 1):
            async with aclosing(self._transport()) as transport:
                response = await transport.handle_async_request(await self._request(url, param))
                async with aclosing(response):
                    if response.status_code not in REDIRECTS:
                        return await self._body(response, kind, param)
                    url = self._rules.read(str(url.join(response.headers.get("location", ""))), param)
        raise MediaNotFetched(f"the {kind}'s URL redirects too often, the limit is {max_redirects}", param=param)

    def _transport(self) -> httpx.AsyncHTTPTransport:
        # a new one per connection, which is for one name; a bare transport has no cookies, proxies or redirects
        self._trust = self._trust or ssl.create_default_context()
        return httpx.AsyncHTTPTransport(verify=self._trust, trust_env=False, http2=False, retries=0)

    async def _request(self, url: httpx.URL, param: str) -> httpx.Request:
        """Return a request to a checked address, under the URL's name."""
        addresses = await self._resolve(host_of(url), port_of(url))
        if not addresses or not all(map(self._rules.allows, addresses)):
            message = "this server does not fetch from the address that the URL's host resolves to"
            raise MediaUrlRefused(message, param=param)
        idle = self._settings.media_url_idle_timeout
        return httpx.Request(
            "GET",
            url.copy_with(host=str(addresses[0]), fragment=None),
            headers={**HEADERS, "Host": url.netloc.decode("ascii")},
            extensions={"sni_hostname": host_of(url), "timeout": httpx.Timeout(idle).as_dict()},
        )

    async def _body(self, response: httpx.Response, kind: Kind, param: str) -> bytes:
        if response.status_code != httpx.codes.OK:
            raise MediaNotFetched(f"the {kind}'s host responded with status {response.status_code}", param=param)
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            # a small body could expand to a large one
            raise MediaNotFetched(f"the {kind}'s host sent a compressed response, which is not accepted", param=param)
        limit, data = self._settings.max_media_bytes, bytearray()
        if (length := _length(response)) > limit:
            raise too_large(length, limit, param)
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > limit:
                raise too_large(len(data), limit, param)
        return bytes(data)


def _check_kind(data: bytes, kind: Kind, param: str) -> None:
    """Check the kind by the first bytes, not by the headers, so that a page of an internal service is not returned."""
    with suppress(MediaError):
        try:
            if media_type_of(data).startswith(f"{kind}/"):
                return
        except HeifNotInstalled as error:
            raise MediaNotFetched(f"the URL's content cannot be read: {error}", param=param) from None
    formats = image_formats() if kind == "image" else VIDEO_FORMATS
    raise MediaNotFetched(f"the URL's content is not one of {formats}", param=param)


def _length(response: httpx.Response) -> int:
    """Return the length in the headers, or 0; the bytes are counted as they arrive."""
    length = response.headers.get("content-length", "")
    return int(length) if length.isdecimal() else 0
