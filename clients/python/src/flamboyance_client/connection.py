"""The requests that both clients pass to httpx, and the streams and errors of httpx as those of this package."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from flamboyance_client.api import Call, CompletionEvents
from flamboyance_client.bodies import encoded
from flamboyance_client.errors import NotConnected, TimedOut, TransportError, UnexpectedReply
from flamboyance_client.replies import Completion
from flamboyance_client.traces import proxy
from flamboyance_client.transfers import size_of

BASE_URL = "http://127.0.0.1:8000"
SCHEMES = ("http", "https")
# codes of OpenSSL for certificates that no authority of the client has signed
UNTRUSTED = (18, 19, 20, 21)


def checked_url(text: str) -> httpx.URL:
    """Return the URL of a server, without the `/v1` of OpenAI's clients. Raises `ValueError` for a text that is none."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ValueError(f"{shown_url(text)!r} is not the URL of a server: {error}") from None
    if url.scheme not in SCHEMES or not url.host:
        raise ValueError(f"{shown_url(text)!r} is not the URL of a server: begin it with http:// or https://")
    if url.query or url.fragment:
        raise ValueError(f"{shown_url(text)!r} is not the URL of a server: leave out what begins with ? or #")
    return url.copy_with(path=url.path.rstrip("/").removesuffix("/v1"))


def shown_url(text: str) -> str:
    """Return a URL as messages show it: without its user and password."""
    return re.sub(r"^([^/@]*//)?[^/]*@", r"\1", text)


def client_settings(base_url: str | None, api_key: str | None, timeout: float | httpx.Timeout) -> dict[str, Any]:
    """Return the arguments of an httpx client, of either kind. Raises `ValueError` for a wrong URL or key.

    Without a URL or a key, those of the variables FLAMBOYANCE_URL and FLAMBOYANCE_API_KEY are used.
    """
    url = (os.environ.get("FLAMBOYANCE_URL") or BASE_URL) if base_url is None else base_url
    key = os.environ.get("FLAMBOYANCE_API_KEY") if api_key is None else api_key
    return {"base_url": checked_url(url), "headers": headers(key), "timeout": timeout}


def request_arguments(call: Call[Any], read: Callable[[Path, int | None], Any]) -> dict[str, Any]:
    """Return the arguments of an httpx request. `read` yields the pieces of a file that is sent."""
    request: dict[str, Any] = {"method": call.method, "url": call.path, "params": call.query or None}
    headers = {} if call.idempotency_key is None else {"Idempotency-Key": call.idempotency_key}
    if call.content is None and call.file is None:
        return request | _json(call, headers)
    headers |= {"Content-Type": call.content_type or ""}
    if call.file is None:
        return request | {"content": call.content, "headers": headers}
    size = size_of(call.file)
    # without a length, the pieces are sent as chunks
    length = {} if size is None else {"Content-Length": str(size)}
    return request | {"content": read(call.file, size), "headers": headers | length}


def _json(call: Call[Any], headers: Mapping[str, str]) -> dict[str, Any]:
    if call.body is None:
        return {"headers": headers}
    return {"content": encoded(call.body), "headers": {**headers, "Content-Type": "application/json"}}


def headers(api_key: str | None) -> Mapping[str, str]:
    """Return the headers of every request. The key is taken without white space around it, and an empty one is none.

    Raises `ValueError` or `TypeError`, without the key in its text, for a key that no server has.
    """
    if api_key is not None and not isinstance(api_key, str):
        raise TypeError(f"api_key is a text or None, not a {type(api_key).__name__}")
    key = (api_key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError("api_key has a character that no key has; a key has only printable characters of ASCII")
    return {"Authorization": f"Bearer {key}"} if key else {}


@contextmanager
def transport_errors() -> Iterator[None]:
    """Convert the errors of httpx to those of this package."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
        hint = (
            reached_hint(error)
            or 'Is a server running there? Start it, or pass its address: Client("http://HOST:PORT")'
        )
        raise NotConnected(f"no connection to {_origin(error)}: {_message(error)}. {hint}.") from error
    except httpx.PoolTimeout as error:
        raise NotConnected("all connections of this client are in use: send fewer requests at a time") from error
    except httpx.TimeoutException as error:
        hint = "Client(timeout=...) sets how long to wait"
        raise TimedOut(f"no reply from {_origin(error)} in time: {_message(error)}. {hint}.") from error
    except httpx.TransportError as error:
        hint = "The server may have stopped: see its log"
        raise TransportError(f"the connection to {_origin(error)} was lost: {_message(error)}. {hint}.") from error
    except httpx.RequestError as error:  # for example a compressed body that is damaged
        raise UnexpectedReply(f"the reply of {_origin(error)} cannot be read: {_message(error)}") from error


def events(response: httpx.Response) -> Iterator[Completion]:
    """Yield the completions of a stream."""
    parser = CompletionEvents()
    with transport_errors():
        for received in response.iter_bytes():
            yield from parser.feed(received)
    parser.finish()


async def async_events(response: httpx.Response) -> AsyncGenerator[Completion, None]:
    parser = CompletionEvents()
    with transport_errors():
        async for received in response.aiter_bytes():
            for event in parser.feed(received):
                yield event
    parser.finish()


def reached_hint(error: httpx.RequestError) -> str | None:
    """Return a sentence about a failure other than that of a missing server: of a proxy or of TLS; else None."""
    return _proxy_hint(error) or _tls_hint(error)


def _tls_hint(error: httpx.RequestError) -> str | None:
    """Return a sentence about the fault of TLS, or None for a request without TLS and for another fault."""
    # the context of an error also has errors of earlier requests
    cause: BaseException | None = error if _is_https(error) else None
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    if not isinstance(cause, ssl.SSLCertVerificationError):
        return "If the server has no TLS, its URL begins with http://"
    if cause.verify_code in UNTRUSTED:
        return "Set SSL_CERT_FILE to a file with the certificates of the authorities to trust"
    return f"The certificate of the server is not valid: {cause.verify_message.removesuffix('.')}"


def _is_https(error: httpx.RequestError) -> bool:
    try:
        return error.request.url.scheme == "https"
    except RuntimeError:  # a transport has not set it
        return False


def _proxy_hint(error: httpx.RequestError) -> str | None:
    """Return a sentence about the proxy that did not connect, or None for a request without a proxy."""
    try:
        address = proxy(error.request)
    except RuntimeError:  # a transport has not set it
        return None
    variables = "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY sets it, and NO_PROXY excludes hosts"
    return address and f"The request goes through the proxy {address}: {variables}"


def _origin(error: httpx.RequestError) -> str:
    """Return the scheme, host and port of the request that failed."""
    try:
        return shown_url(str(error.request.url.join("/")).removesuffix("/"))
    except RuntimeError:  # a transport has not set it
        return "the server"


def _message(error: Exception) -> str:
    return str(error).removesuffix(".") or type(error).__name__
