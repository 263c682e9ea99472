"""Connections of each process and event loop: on one that a fork has copied, a process may read the answer to another.

`multiprocessing` may send a client to another process, which makes it again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, Never, Self, TypeVar

import httpx

Http_co = TypeVar("Http_co", bound=httpx.Client | httpx.AsyncClient, covariant=True)
CERTIFICATES = "SSL_CERT_FILE"  # the variable of the environment that httpx reads
# a process, and an event loop in it
Scope = tuple[int, asyncio.AbstractEventLoop | None]


def process() -> Scope:
    return os.getpid(), None


def process_and_loop() -> Scope:
    try:
        return os.getpid(), asyncio.get_running_loop()
    except RuntimeError:  # there is none
        return process()


class PerScope(Generic[Http_co]):
    """Makes an httpx client in each scope that uses it: in the first at once, and in others when they ask.

    The clients of earlier processes are kept unused, because closing them may wait for a lock that was held at the fork.
    Those of closed loops are dropped.
    """

    def __init__(self, make: Callable[[], Http_co], scope: Callable[[], Scope]) -> None:
        self._make, self._scope = make, scope
        self._clients = {scope(): self._new()}

    def get(self) -> Http_co:
        """Return the httpx client of this scope. It is closed if a client of an earlier scope was."""
        if (made := self.made()) is not None:
            return made
        earlier = list(self._clients.items())
        closed = next((client for _, client in earlier if client.is_closed), None)
        for scope, _ in earlier:
            if scope[1] is not None and scope[1].is_closed():
                self._clients.pop(scope, None)
        return self._clients.setdefault(self._scope(), self._new() if closed is None else closed)

    def _new(self) -> Http_co:
        """Return a new client. An error of its certificates, which has no name, says where they are set."""
        try:
            return self._make()
        except OSError as error:
            if not (path := os.environ.get(CERTIFICATES)):
                raise
            reason = error.strerror or str(error)
            raise OSError(f"{CERTIFICATES} is {path!r}, of which no certificates can be read: {reason}") from error

    def made(self) -> Http_co | None:
        """Return the httpx client of this scope, or None if it has not used one."""
        return self._clients.get(self._scope())


def close(clients: PerScope[httpx.Client]) -> None:
    """Close the connections of this process, if it has any."""
    if (made := clients.made()) is not None:
        made.close()


class MadeAgain:
    """A client that `multiprocessing` may send to another process, which makes it again of the same arguments.

    Other pickles, which may be stored, are refused: they would have the API key.
    """

    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *arguments: Any, **named: Any) -> Self:
        client = super().__new__(cls)
        client._arguments = arguments, named
        return client

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        ForkingPickler.register(cls, _reduced)

    def __copy__(self) -> Self:
        """Return a client that is made of the same arguments, with connections of its own."""
        arguments, named = self._arguments
        return type(self)(*arguments, **named)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.__copy__()

    def __reduce__(self) -> Never:
        raise TypeError(f"only multiprocessing can pickle a {type(self).__name__}, because it has an API key")


def _reduced(client: MadeAgain) -> tuple[Any, ...]:
    return _made, (type(client), *client._arguments)


def _made(kind: type[MadeAgain], arguments: tuple[Any, ...], named: dict[str, Any]) -> MadeAgain:
    return kind(*arguments, **named)
