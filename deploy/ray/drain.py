"""Drains the requests of a fleet before it ends, as a server does after a signal.

Ray itself would end its proxy first, which closes the connections of all clients.
"""

from __future__ import annotations

import threading
import time

from deploy.ray.app import GATEWAYS, REPLICAS, call_all
from server.serving import FINAL_EVENTS_SECONDS

POLL_SECONDS = 0.2
# the proxy may still send the end of an answer that has left its gateway
LAST_BYTES_SECONDS = 1.0


def drain(timeout: float, hurry: threading.Event) -> None:
    """Refuse new requests, and let running ones finish for `timeout` seconds or until `hurry` is set; then they fail."""
    if not _wait_until_empty(timeout, hurry):
        call_all(REPLICAS, "fail_requests")
        _wait_until_empty(FINAL_EVENTS_SECONDS, threading.Event())
    time.sleep(LAST_BYTES_SECONDS)


def _wait_until_empty(timeout: float, hurry: threading.Event) -> bool:
    """Wait until no gateway has a request, for `timeout` seconds or until `hurry` is set. Return whether none has."""
    end = time.monotonic() + timeout
    # asked again each time: a gateway that Ray has started meanwhile has to refuse requests, too
    while any(isinstance(num_requests, int) and num_requests for num_requests in call_all(GATEWAYS, "drain")):
        if time.monotonic() >= end or hurry.wait(POLL_SECONDS):
            return False
    return True
