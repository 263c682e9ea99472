"""The address to listen on is checked as asyncio will bind it."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import pytest

from server.address import check_address
from server.settings import SettingsError

IPV4 = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
IPV6 = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0))


@pytest.fixture(autouse=True)
def _without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand for a kernel without IPv6, whose resolver still has IPv6 addresses."""
    original = socket.socket

    def create(family: int, *arguments: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        return original(family, *arguments)

    monkeypatch.setattr(socket, "socket", create)


def test_a_family_that_the_system_lacks_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [IPV6, IPV4])
    check_address("localhost", 0)


def test_a_host_with_only_such_addresses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [IPV6])
    with pytest.raises(SettingsError, match=r"^host: '::1' is not an address of this machine; .*not supported"):
        check_address("::1", 0)
