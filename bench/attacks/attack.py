"""An attack: a function that sends the requests of an attacker, and the session with its connections and answers.

A round ends when its requests are answered; rounds are repeated until the measurement is complete. Then every
connection of the session is closed, which ends a round at once.
"""

from __future__ import annotations

import http.client
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from bench.target import Answer, Request, Target, exchange

Severity = Literal["critical", "high", "medium", "low"]
ATTACK_SECONDS = 300.0
# seconds from the first connection until an attack has an effect
FIRST_PAUSE = 0.5


class Session:
    """The connections and the answers of one attack."""

    def __init__(self, target: Target, source: str) -> None:
        self.target = target
        self.answers: list[Answer] = []
        self.num_rounds = 0
        self._source = source or None
        self._stop = threading.Event()
        self._has_begun = threading.Event()
        self._lock = threading.Lock()
        self._open: set[http.client.HTTPConnection | socket.socket] = set()

    @property
    def is_over(self) -> bool:
        return self._stop.is_set()

    def wait_for_first(self, seconds: float) -> None:
        """Wait until the first connection is opened: building large requests takes a while."""
        self._has_begun.wait(seconds)
        self.sleep(FIRST_PAUSE)

    def sleep(self, seconds: float) -> None:
        self._stop.wait(seconds)

    def send(self, request: Request) -> None:
        """Send a request and read its answer, unless the attack is over."""
        if self.is_over:
            return
        connection = self.target.connect(ATTACK_SECONDS, self._source)
        self._register(connection)
        answer = exchange(connection, request)
        if not self.is_over:
            with self._lock:
                self.answers.append(answer)
        self.close(connection)

    def send_all(self, requests: Iterable[Request], num_connections: int) -> None:
        """Send requests on several connections at a time."""
        with ThreadPoolExecutor(num_connections) as clients:
            list(clients.map(self.send, requests))

    def connect(self, data: bytes = b"") -> socket.socket | None:
        """Open a connection and send bytes on it; None if the server refuses it."""
        try:
            connection = socket.create_connection(
                (self.target.host, self.target.port), timeout=ATTACK_SECONDS, source_address=(self._source or "", 0)
            )
        except OSError:
            return None
        self._register(connection)
        with suppress(OSError):
            connection.sendall(data)
        return connection

    def close(self, connection: http.client.HTTPConnection | socket.socket | None) -> None:
        if connection is not None:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def end(self) -> None:
        """Close all connections, and open no further ones."""
        self._stop.set()
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            plain = connection if isinstance(connection, socket.socket) else connection.sock
            with suppress(OSError, AttributeError):
                plain.shutdown(socket.SHUT_RDWR)

    def statuses(self) -> Counter[str]:
        return Counter(str(answer.status or answer.error) for answer in self.answers)

    def unclear(self) -> list[Answer]:
        """Return the answers that are neither a success nor a clear refusal."""
        return [answer for answer in self.answers if answer.status and not answer.is_clear]

    def _register(self, connection: http.client.HTTPConnection | socket.socket) -> None:
        with self._lock:
            self._open.add(connection)
        self._has_begun.set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """An attack by name. `run` is one round of it; with `is_refused`, every request must be refused.

    `max_seconds` is the maximum time of an answer to it.
    """

    name: str
    severity: Severity
    run: Callable[[Session], None]
    is_refused: bool = False
    max_seconds: float | None = None
    prepare: Callable[[Target], None] | None = None
    clean: Callable[[Target], None] | None = None


def repeated(*requests: Callable[[], Request], num_connections: int = 1) -> Callable[[Session], None]:
    """Return a round that sends these requests, which are built on first use, because some are large."""
    made: list[Request] = []

    def run(session: Session) -> None:
        if not made:
            made.extend(make() for make in requests)
        session.send_all(made, num_connections)

    return run
