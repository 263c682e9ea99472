"""Checks the address on which the server will listen before a model is loaded."""

from __future__ import annotations

import errno
import socket

from server.settings import SettingsError


def check_address(host: str, port: int) -> None:
    """Bind each address of `host` for a moment. Raises `SettingsError` if the server could not listen there."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"host: {host!r} is not an address or name of this machine: {error}") from None
    lacking: list[OSError] = []
    for family, kind, protocol, _, address in addresses:
        try:
            probe = socket.socket(family, kind, protocol)
        except OSError as error:  # the system lacks this address family: the server skips it, too
            lacking.append(error)
            continue
        with probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                raise SettingsError(_reason(host, port, error)) from None
    if len(lacking) == len(addresses):
        raise SettingsError(_reason(host, port, lacking[0]))


def _reason(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port: {port} is in use on {host}; set another port, or 0 for any free one"
    if error.errno == errno.EACCES:
        return f"port: {port} needs the privileges of an administrator; set a port from 1024 on"
    return f"host: {host!r} is not an address of this machine; 0.0.0.0 listens on all of them ({error.strerror})"
