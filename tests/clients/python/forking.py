"""A process that uses one client before and after it forks: `python -m tests.clients.python.forking KIND URL`.

It prints the first model of the server's replies: of the process, of its child (twice), of the process again, and what a
child says of a client that was closed before the fork.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable

from flamboyance_client import AsyncClient, Client


def blocking(url: str) -> tuple[Callable[[], str], Callable[[], None]]:
    client = Client(url)
    return lambda: client.models()[0].id, client.close


def asynchronous(url: str) -> tuple[Callable[[], str], Callable[[], None]]:
    client = AsyncClient(url)
    loops: dict[int, asyncio.AbstractEventLoop] = {}

    def loop() -> asyncio.AbstractEventLoop:
        return loops.setdefault(os.getpid(), asyncio.new_event_loop())

    return (
        lambda: loop().run_until_complete(client.models())[0].id,
        lambda: loop().run_until_complete(client.close()),
    )


def in_child(call: Callable[[], str]) -> str:
    """Return what a call returns in a child process, or the name of its error."""
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            result = call()
        except Exception as error:
            result = type(error).__name__
        os.write(write, result.encode())
        os._exit(0)
    os.wait()
    return os.read(read, 1000).decode()


def main(kind: str, url: str) -> None:
    model, close = blocking(url) if kind == "sync" else asynchronous(url)
    print(model(), in_child(lambda: f"{model()} {model()}"), model(), flush=True)
    close()
    print(in_child(model))


if __name__ == "__main__":
    main(*sys.argv[1:])
