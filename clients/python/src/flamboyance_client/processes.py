"""Connections of each process: on one that a fork has copied, a process may read the answer to the request of another."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, TypeVar

import httpx

Http_co = TypeVar("Http_co", bound=httpx.Client | httpx.AsyncClient, covariant=True)


class PerProcess(Generic[Http_co]):
    """Makes an httpx client in each process that uses it: in the first at once, and in those that it forks when they ask.

    The clients of earlier processes are kept unused, because closing them may wait for a lock that was held at the fork.
    """

    def __init__(self, make: Callable[[], Http_co]) -> None:
        self._make = make
        self._clients = {os.getpid(): make()}

    def get(self) -> Http_co:
        """Return the httpx client of this process. It is closed if a client that this process has inherited was."""
        if (made := self.made()) is not None:
            return made
        inherited = list(self._clients.values())[-1]
        return self._clients.setdefault(os.getpid(), inherited if inherited.is_closed else self._make())

    def made(self) -> Http_co | None:
        """Return the httpx client of this process, or None if it has not used one."""
        return self._clients.get(os.getpid())


def close(clients: PerProcess[httpx.Client]) -> None:
    """Close the connections of this process, if it has any."""
    if (made := clients.made()) is not None:
        made.close()
