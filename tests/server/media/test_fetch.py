"""Fetching from a real web server: only media are accepted, and nothing makes the server connect to other hosts."""

from __future__ import annotations

import asyncio
import gzip
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from ipaddress import ip_address

import pytest
import trustme

from model import heif
from server.errors import InvalidMedia, MediaNotFetched, MediaUrlRefused
from server.media.addresses import Address
from server.media.fetch import Fetcher, Resolve, resolve
from server.media.source import EncodedMedia, encoded
from server.settings import Settings
from tests.server.conftest import png
from tests.server.media.fake_web import Web, Write, answer
from tests.server.media.videos import film

pytestmark = pytest.mark.anyio
RED = png("red")
PARAM = "prompt[3].image_url.url"


@pytest.fixture
async def web() -> AsyncIterator[Web]:
    async with Web({"/a.png": answer(RED, Content_Type="image/png")}).served() as web:
        yield web


def resolver(*addresses: str, hosts: list[str] | None = None) -> Resolve:
    """Return a resolver to these addresses, which appends each host to `hosts`."""

    async def resolve(host: str, port: int) -> Sequence[Address]:
        if hosts is not None:
            hosts.append(host)
        return [ip_address(address) for address in addresses]

    return resolve


LOOPBACK = resolver("127.0.0.1")


def fetcher(
    web: Web, *, resolve: Resolve = LOOPBACK, trust: ssl.SSLContext | None = None, **settings: object
) -> Fetcher:
    """Return a fetcher that may connect to this machine by HTTP."""
    fields = {
        "media_url_hosts": "cdn.example",
        "media_url_ports": str(web.port),
        "media_url_http": True,
        "media_url_networks": "127.0.0.0/8, ::1/128",
        "max_media_mb": 0.125,
        **settings,
    }
    return Fetcher(Settings.model_validate(fields), resolve=resolve, trust=trust)


async def fetch(using: Fetcher, web: Web, path: str = "/a.png", host: str = "cdn.example") -> EncodedMedia:
    return await using.fetch(f"http://{host}:{web.port}{path}", "image", PARAM)


async def test_media_are_fetched(web: Web) -> None:
    seconds: list[float] = []
    fetching = fetcher(web)
    fetching._observe = seconds.append
    media = await fetch(fetching, web, "/a.png")
    assert (media.data, media.kind, media.param) == (RED, "image", PARAM)
    assert media.digest == encoded(RED, "image", "").digest
    assert len(seconds) == 1


async def test_a_request_has_only_the_necessary_headers(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's proxies, cookies and credentials are not used, not even by a second request."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    web.pages["/a.png"] = answer(RED, Set_Cookie="a=b")
    fetching = fetcher(web)
    for _ in range(2):
        await fetch(fetching, web)
    assert web.headers(0) == web.headers(1)
    assert web.headers(0) == {
        "accept": "image/*, video/*",
        "accept-encoding": "identity",
        "user-agent": "flamboyance",
        "host": f"cdn.example:{web.port}",
    }


async def test_nothing_is_fetched_from_unlisted_hosts(web: Web) -> None:
    hosts: list[str] = []
    fetching = fetcher(web, resolve=resolver("127.0.0.1", hosts=hosts))
    for url in (f"http://evil.example:{web.port}/a.png", f"http://127.0.0.1:{web.port}/a.png"):
        with pytest.raises(MediaUrlRefused, match="host") as caught:
            await fetching.fetch(url, "image", PARAM)
        assert caught.value.param == PARAM
    assert (hosts, web.heads) == ([], [])  # not even resolved


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["127.0.0.1", "8.8.8.8"], ["::1"], ["::ffff:127.0.0.1"], []]
)
async def test_a_name_that_leads_inside_is_refused(web: Web, addresses: list[str]) -> None:
    fetching = fetcher(web, resolve=resolver(*addresses), media_url_networks="10.0.0.0/8")
    with pytest.raises(MediaUrlRefused, match="address that the URL's host resolves to"):
        await fetch(fetching, web)
    assert web.heads == []


async def test_the_answer_of_the_systems_resolver_is_checked(web: Web) -> None:
    # the last three are notations of 127.0.0.1 that only a resolver understands
    for host in ("localhost", "127.0.0.1", "127.1", "2130706433", "0x7f000001"):
        restricted = fetcher(web, resolve=resolve, media_url_hosts=host, media_url_networks="10.0.0.0/8")
        with pytest.raises((MediaUrlRefused, MediaNotFetched)):
            await fetch(restricted, web, host=host)
    assert web.heads == []
    assert (await fetch(fetcher(web, resolve=resolve, media_url_hosts="127.0.0.1"), web, host="127.0.0.1")).data == RED


async def test_a_name_is_resolved_once_and_its_address_is_the_one_connected_to(web: Web) -> None:
    """A second, different answer (DNS rebinding) is never requested."""
    hosts: list[str] = []

    async def changing(host: str, port: int) -> Sequence[Address]:
        hosts.append(host)
        return [ip_address("127.0.0.1" if len(hosts) == 1 else "127.0.0.2")]

    assert (await fetch(fetcher(web, resolve=changing), web)).data == RED
    assert hosts == ["cdn.example"]


async def test_a_name_that_does_not_resolve_is_a_client_error(web: Web) -> None:
    async def unknown(host: str, port: int) -> Sequence[Address]:
        raise OSError("Name or service not known")

    with pytest.raises(MediaNotFetched, match="from its host") as caught:
        await fetch(fetcher(web, resolve=unknown), web)
    assert caught.value.status == 400


async def test_an_ipv6_address_is_connected_to() -> None:
    try:
        async with Web({"/a.png": answer(RED)}).served(host="::1") as web:
            media = await fetch(fetcher(web, resolve=resolver("::1")), web)
    except OSError as error:
        assert "cannot assign" in str(error).lower() or "not supported" in str(error).lower()  # noqa: PT017
        return
    assert media.data == RED


# redirects


async def test_redirects_are_not_followed_by_default(web: Web) -> None:
    web.pages["/r"] = answer(b"", "302 Found", Location="/a.png")
    with pytest.raises(MediaNotFetched, match="redirects too often"):
        await fetch(fetcher(web), web, "/r")
    assert web.paths == ["/r"]


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See", "307 Temporary", "308 Permanent"])
async def test_redirects_may_be_followed(web: Web, status: str) -> None:
    web.pages["/r"] = answer(b"", status, Location="/a.png")
    assert (await fetch(fetcher(web, media_url_redirects=1), web, "/r")).data == RED


@pytest.mark.parametrize(
    "location",
    [
        "http://evil.example:{port}/a.png",
        "//evil.example:{port}/a.png",
        "http://127.0.0.1:{port}/a.png",
        "http://cdn.example:1/a.png",
        "http://user@cdn.example:{port}/a.png",
        "file:///etc/passwd",
        "http://inner.example:{port}/a.png",
    ],
)
async def test_each_redirect_is_checked_as_if_it_came_first(web: Web, location: str) -> None:
    async def inner(host: str, port: int) -> Sequence[Address]:
        return [ip_address("192.168.0.1" if host == "inner.example" else "127.0.0.1")]

    web.pages["/r"] = answer(b"", "302 Found", Location=location.format(port=web.port))
    hosts = "cdn.example, inner.example"
    with pytest.raises(MediaUrlRefused) as caught:
        await fetch(fetcher(web, resolve=inner, media_url_redirects=3, media_url_hosts=hosts), web, "/r")
    assert (caught.value.param, web.paths) == (PARAM, ["/r"])


async def test_the_number_of_redirects_is_limited(web: Web) -> None:
    web.pages["/r"] = answer(b"", "302 Found", Location="/r")
    with pytest.raises(MediaNotFetched, match="redirects too often"):
        await fetch(fetcher(web, media_url_redirects=3), web, "/r")
    assert web.paths == ["/r"] * 4


# responses


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (answer(b"", "404 Not Found"), "status 404"),
        (answer(RED, "500 Oh"), "status 500"),
        (answer(RED, "206 Partial Content"), "status 206"),
        (answer(b"<html>secret</html>", Content_Type="image/png"), "not one of JPEG, PNG, WebP, GIF"),
        (answer(b"{}", Content_Type="application/json"), "not one of JPEG, PNG, WebP, GIF"),
        (answer(film(["red"]), Content_Type="image/png"), "not one of JPEG, PNG, WebP, GIF"),
        (answer(b""), "not one of JPEG, PNG, WebP, GIF"),
        (answer(gzip.compress(RED), Content_Encoding="gzip"), "compressed"),
        (answer(RED)[:-5], "from its host"),
        (b"SSH-2.0-OpenSSH\r\n", "from its host"),
        (b"", "from its host"),
    ],
)
async def test_a_response_that_is_not_an_image_is_a_client_error(web: Web, page: bytes, reason: str) -> None:
    web.pages["/x"] = page
    with pytest.raises(MediaNotFetched, match=reason) as caught:
        await fetch(fetcher(web), web, "/x")
    assert (caught.value.status, caught.value.param) == (400, PARAM)
    assert "127.0.0.1" not in caught.value.message
    assert "secret" not in caught.value.message


async def test_a_heic_still_without_the_extra_names_it(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heif, "is_installed", lambda: False)
    web.pages["/x"] = answer(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(MediaNotFetched, match=r"\(the extra heif\)") as caught:
        await fetch(fetcher(web), web, "/x")
    assert (caught.value.status, caught.value.param) == (400, PARAM)


async def test_a_video_is_fetched_as_a_video(web: Web) -> None:
    web.pages["/v"] = answer(film(["red"]), Content_Type="text/html")
    media = await fetcher(web).fetch(f"http://cdn.example:{web.port}/v", "video", PARAM)
    assert (media.kind, media.data) == ("video", film(["red"]))


async def test_a_length_over_the_limit_is_refused_before_the_body(web: Web) -> None:
    held = asyncio.Event()

    async def promise(write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        await held.wait()  # no byte of the body is ever sent

    web.pages["/x"] = promise
    with pytest.raises(InvalidMedia, match=r"^the file has 1,000,000 bytes, the limit is 0.125 MiB \(max_media_mb\)$"):
        await fetch(fetcher(web), web, "/x")
    held.set()


async def test_bytes_are_counted_while_they_arrive(web: Web) -> None:
    sent = 0

    async def endless(write: Write) -> None:
        nonlocal sent
        await write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            await write(b"1000\r\n" + bytes(4096) + b"\r\n")
            sent += 4096

    web.pages["/x"] = endless
    with pytest.raises(InvalidMedia, match=r"the limit is 0.125 MiB"):
        await fetch(fetcher(web), web, "/x")
    assert sent < 20 * 2**20  # no more than the socket buffers hold


# timeouts


async def test_an_idle_host_times_out(web: Web) -> None:
    async def silent(write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\n")
        await asyncio.sleep(30)

    web.pages["/x"] = silent
    with pytest.raises(MediaNotFetched, match="in time"):
        await fetch(fetcher(web, media_url_idle_timeout=0.1), web, "/x")


async def test_the_whole_response_has_a_timeout(web: Web) -> None:
    async def drip(write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(1000):
            await write(b"x")
            await asyncio.sleep(0.05)

    web.pages["/x"] = drip
    started = time.monotonic()
    with pytest.raises(MediaNotFetched, match="in time"):
        await fetch(fetcher(web, media_url_timeout=0.3), web, "/x")
    assert time.monotonic() - started < 20


async def test_resolving_counts_towards_the_timeout(web: Web) -> None:
    async def slow(host: str, port: int) -> Sequence[Address]:
        await asyncio.sleep(30)
        return []

    with pytest.raises(MediaNotFetched, match="in time"):
        await fetch(fetcher(web, resolve=slow, media_url_timeout=0.1), web)


async def test_the_number_of_concurrent_fetches_is_limited(web: Web) -> None:
    num_running, max_running = 0, 0

    async def counting(write: Write) -> None:
        nonlocal num_running, max_running
        num_running += 1
        max_running = max(max_running, num_running)
        await asyncio.sleep(0.02)
        num_running -= 1
        await write(answer(RED))

    web.pages["/x"] = counting
    fetching = fetcher(web, media_url_concurrency=2)
    await asyncio.gather(*(fetch(fetching, web, "/x") for _ in range(6)))
    assert max_running == 2


# certificates


@pytest.mark.parametrize(
    ("certified", "is_trusted", "is_fetched"),
    [
        ("cdn.example", True, True),
        ("other.example", True, False),
        ("127.0.0.1", True, False),
        ("cdn.example", False, False),
    ],
)
async def test_the_certificate_must_be_that_of_the_name(certified: str, is_trusted: bool, is_fetched: bool) -> None:
    """The connection goes to an address, but the certificate must be that of the name."""
    authority, tls, trust = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert(certified).configure_cert(tls)
    if is_trusted:
        authority.configure_trust(trust)
    async with Web({"/a.png": answer(RED)}).served(tls) as web:
        fetching = fetcher(web, trust=trust, media_url_http=False)
        url = f"https://cdn.example:{web.port}/a.png"
        if is_fetched:
            assert (await fetching.fetch(url, "image", PARAM)).data == RED
            return
        with pytest.raises(MediaNotFetched, match="from its host"):
            await fetching.fetch(url, "image", PARAM)
        assert web.paths == []
