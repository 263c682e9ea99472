"""A process that uses one async client in several event loops: `python -m tests.clients.python.looping URL`.

It prints the first model of the server's replies, twice for each loop, and how many httpx clients are kept; then what a
loop says of the client after another one has closed it. In a process with other tests, the connections of closed loops
would be errors, which Python reports as unclosed.
"""

from __future__ import annotations

import asyncio
import sys

from flamboyance_client import AsyncClient


def main(url: str) -> None:
    client = AsyncClient(url)

    async def models() -> str:
        return " ".join([(await client.models())[0].id for _ in range(2)])

    print(*[asyncio.run(models()) for _ in range(3)], len(client._http._clients))
    asyncio.run(client.close())
    try:
        asyncio.run(models())
    except RuntimeError as error:
        print(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
