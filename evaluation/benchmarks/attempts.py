"""Sends queries again after a failure that may pass, and ends a run whose server does not come back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from flamboyance_client import BadRequest, FlamboyanceError, NotConnected, ServerFault, TransportError, UnexpectedReply

Reply = TypeVar("Reply")

# seconds before each further try
DELAYS = (1.0, 4.0)
# the statuses of a proxy that does not reach the server
PROXY_STATUSES = (502, 504)
# after this number of failures in a row that are not about the query, the server is taken for lost
MAX_LOST = 16


class ServerLost(FlamboyanceError):
    """No query is answered any more."""


async def repeat(send: Callable[[], Awaitable[Reply]]) -> Reply:
    """Return what `send` returns; it is called again if the connection is lost or the reply is no valid one."""
    for delay in DELAYS:
        try:
            return await send()
        except (TransportError, UnexpectedReply, ServerFault) as error:
            # the client has already tried again to connect
            if not _may_pass(error):
                raise
        await asyncio.sleep(delay)
    return await send()


def _may_pass(error: FlamboyanceError) -> bool:
    if isinstance(error, ServerFault):
        return error.status in PROXY_STATUSES
    return not isinstance(error, NotConnected)  # the client itself has tried several times to connect


@dataclass(slots=True)
class Failures:
    """Counts the queries that failed, and those in a row that failed for another reason than the query itself."""

    num_failed: int = 0
    num_lost: int = 0

    def add(self, error: Exception) -> None:
        """Count a failure; raises ServerLost after too many in a row."""
        self.num_failed += 1
        self.num_lost = 0 if isinstance(error, BadRequest | ValueError) else self.num_lost + 1
        if self.num_lost >= MAX_LOST:
            raise ServerLost(
                f"{self.num_lost} queries in a row failed, the last one: {error} The same command continues."
            )

    def end_row(self) -> None:
        self.num_lost = 0
