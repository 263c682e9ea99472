"""Rules for the URLs of media: an allow-list of hosts and ports, and only public addresses.

An allowed name may resolve to any address, so both are checked: the name before it is resolved, and each address after.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

import httpx

from server.errors import MediaUrlRefused
from server.setting_values import parts
from server.settings import Settings, SettingsError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_URL_LENGTH = 4096
# a name or an IPv4 address, a suffix that begins with a dot, or an IPv6 address
HOST = re.compile(r"[^\s/@*:]+|[0-9a-fA-F:.]+")
# IPv6 addresses that a gateway translates to the IPv4 address in their last 32 bits
NAT64 = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))


@dataclass(frozen=True, slots=True)
class UrlRules:
    """The allowed URLs.

    `hosts` are exact names, or suffixes if they begin with a dot. `networks` are allowed although they are not public.
    """

    hosts: tuple[str, ...]
    ports: frozenset[int]
    schemes: tuple[str, ...]
    networks: tuple[Network, ...]

    @classmethod
    def from_settings(cls, settings: Settings) -> UrlRules:
        """Read the rules from the settings. Raises `SettingsError`."""
        return cls(
            hosts=tuple(map(_host, parts(settings.media_url_hosts or ""))),
            ports=frozenset(_port(port) for port in parts(settings.media_url_ports or "")),
            schemes=("https", "http") if settings.media_url_http else ("https",),
            networks=tuple(_network(network) for network in parts(settings.media_url_networks or "")),
        )

    def read(self, url: str, param: str) -> httpx.URL:
        """Parse and check a URL; the result is fetched, not parsed again. Raises `MediaUrlRefused`."""
        parsed = _parse(url, param)
        if parsed.scheme not in self.schemes:
            raise MediaUrlRefused(f"a URL must begin with {' or '.join(f'{s}://' for s in self.schemes)}", param=param)
        if parsed.userinfo:
            raise MediaUrlRefused("a URL must not contain a user or a password", param=param)
        if not any(_is_match(host_of(parsed), allowed) for allowed in self.hosts):
            raise MediaUrlRefused("this server does not fetch from the URL's host", param=param)
        if port_of(parsed) not in self.ports:
            raise MediaUrlRefused("this server does not fetch from the URL's port", param=param)
        return parsed

    def allows(self, address: Address) -> bool:
        """Return whether the address, and any IPv4 address that it embeds, is public or in one of the networks."""
        return all(
            (target.is_global and not target.is_multicast) or any(target in network for network in self.networks)
            for target in _targets(address)
        )


def host_of(url: httpx.URL) -> str:
    """Return the host as sent on the wire; an IPv6 address without its brackets."""
    return url.raw_host.decode("ascii")


def port_of(url: httpx.URL) -> int:
    return DEFAULT_PORTS[url.scheme] if url.port is None else url.port


def _parse(url: str, param: str) -> httpx.URL:
    # parsers disagree about backslashes, spaces, control characters and characters beyond ASCII
    if len(url) > MAX_URL_LENGTH or "\\" in url or not all("!" <= character <= "~" for character in url):
        message = f"invalid URL: expected at most {MAX_URL_LENGTH} printable ASCII characters, without backslashes"
        raise MediaUrlRefused(message, param=param)
    try:
        return httpx.URL(url)
    except httpx.InvalidURL:
        raise MediaUrlRefused("invalid URL", param=param) from None


def _is_match(host: str, allowed: str) -> bool:
    return host.endswith(allowed) and len(host) > len(allowed) if allowed.startswith(".") else host == allowed


def _targets(address: Address) -> Iterator[Address]:
    """Yield the address and the IPv4 addresses embedded in it; for an IPv4-mapped address only the latter."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            yield address.ipv4_mapped
            return
        if address.sixtofour is not None:
            yield address.sixtofour
        if any(address in network for network in NAT64):
            yield IPv4Address(int(address) & 0xFFFFFFFF)
    yield address


def _host(text: str) -> str:
    if not HOST.fullmatch(text):
        raise SettingsError(
            f"media_url_hosts: {text!r} is not a host name, such as media.a.org, or .a.org for subdomains"
        )
    return text.lower()


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise SettingsError(f"media_url_ports: {text!r} is not a port, expected 1 to 65535")
    return int(text)


def _network(text: str) -> Network:
    try:
        return ip_network(text)
    except ValueError as error:
        raise SettingsError(f"media_url_networks: {error}") from None
