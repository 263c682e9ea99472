"""A limit that clients share: one client gets a part of it, so that others find room.

Slots and bytes are counted by client. A full limit is refused with 503, a client that has its share with 429.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.errors import ClientOverShare, Overloaded


class SharedLimit:
    """A limited resource; `max_share` is the part that a single client can get. `unit` names it, in the plural.

    `retry_after` returns the seconds after which a refused client may try again. A client may hold up to a fixed multiple
    of what it leaves free. So new clients always find room, and busy clients converge to equal shares (dynamic thresholds:
    Choudhury and Hahne, 1998). A client that holds nothing may take one.
    """

    def __init__(self, total: int, max_share: float, unit: str, retry_after: Callable[[], int] = lambda: 1) -> None:
        self.total = total
        self.used = 0
        self._unit = unit
        self._max_share = max_share
        self._retry_after = retry_after
        self._held: Counter[str] = Counter()

    @property
    def is_full(self) -> bool:
        return self.used >= self.total

    def check(self, client: str, amount: int = 1, *, closes: bool = False) -> None:
        """Check that `client` can take `amount` now.

        Raises `Overloaded` if less is free, and `ClientOverShare` if the client would have more than its share.
        """
        free, held = max(self.total - self.used, 0), self._held[client]
        if amount > free:
            message = f"the limit of {self.total} {self._unit} is reached"
            raise Overloaded(message, retry_after=self._retry_after(), closes=closes)
        is_first = not held and amount == 1
        if not is_first and held + amount > self._max_share * (held + free):
            raise self._over_share(closes=closes)

    def check_held(self, client: str) -> None:
        """Check that `client` does not hold more than its share of the total. Raises `ClientOverShare`."""
        if self._held[client] > self._max_share * self.total:
            raise self._over_share()

    def _over_share(self, *, closes: bool = False) -> ClientOverShare:
        message = f"this client has its share of the {self.total} {self._unit}"
        return ClientOverShare(message, retry_after=self._retry_after(), closes=closes)

    def take(self, client: str, amount: int = 1) -> None:
        self.used += amount
        self._held[client] += amount

    def release(self, client: str, amount: int = 1) -> None:
        self.used -= amount
        self._held[client] -= amount
        if not self._held[client]:
            del self._held[client]

    @contextmanager
    def hold(self, client: str, *, closes: bool = False) -> Iterator[None]:
        """Take one for the duration of a block. Raises what `check` raises."""
        self.check(client, closes=closes)
        self.take(client)
        try:
            yield
        finally:
            self.release(client)
