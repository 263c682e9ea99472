"""Decides which web pages may send requests: those of this server, and those of the origins in the settings.

A page of another site cannot send JSON or read a response unless CORS permits it. But it could send a form, or a request
without a body, to a server that needs no key: so its requests that change something are refused. It could also let its own
name resolve to a loopback address (DNS rebinding): so a server that listens on loopback and needs no key accepts only the
names of this machine in the header `Host`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping
from typing import Any

from server.setting_values import parts
from server.settings import Settings

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost"})
# methods that change nothing
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
# values of `Sec-Fetch-Site` for a page of this server, and for a request that no page sent
OWN_SITES = frozenset({"same-origin", "none"})
METHODS = ("GET", "HEAD", "POST", "PATCH", "DELETE")
EXPOSED_HEADERS = ("ETag", "Retry-After", "X-Request-Id", "X-Should-Retry")


def allowed_hosts(settings: Settings) -> frozenset[str] | None:
    """Return the names that the header `Host` may have, without ports; None for any."""
    if settings.allowed_hosts is not None:
        return _names(settings.allowed_hosts)
    if settings.api_key is None and _is_loopback(settings.host):
        return LOCAL_NAMES | {settings.host.lower()}
    return None


def name_of(host: str) -> str:
    """Return the value of a `Host` header without its port."""
    name, separator, port = host.rpartition(":")
    return (name if separator and (port.isdecimal() or not port) else host).lower().removesuffix(".")


def is_address(name: str) -> bool:
    """Return whether the name in a `Host` header is an IP address, which no site can redirect."""
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def permitted_origins(settings: Settings) -> frozenset[str]:
    """Return the origins whose pages may send any request; `*` is all of them."""
    return _names(settings.cors_origins or "")


def may_change(headers: Mapping[str, str], origins: Collection[str]) -> bool:
    """Return whether a request may change something: it comes from no page, or from one of this server or these origins.

    Browsers send the page's origin, and most also whether it is this server's, which may have another name at a proxy. A
    page of another site cannot add a key.
    """
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if "authorization" in headers or not {"*", (origin or "").lower()}.isdisjoint(origins):
        return True
    if site is not None:
        return site in OWN_SITES
    return origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower()


def cors_options(origins: str) -> dict[str, Any]:
    """Return the options of `CORSMiddleware` that let the pages of these origins send requests and read responses."""
    return {
        "allow_origins": sorted(_names(origins)),
        "allow_methods": METHODS,
        "allow_headers": ["*"],
        "expose_headers": EXPOSED_HEADERS,
    }


def _names(setting: str) -> frozenset[str]:
    return frozenset(map(str.lower, parts(setting)))


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower().removesuffix(".") in LOOPBACK_NAMES
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
