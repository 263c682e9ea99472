"""Decides which requests may be sent again after their replica was lost: it may have executed them.

A request that is sent twice must not be done twice. Requests that only read or compute may always be repeated, and so
may uploads, which are named by their content. A request that makes something gets an `Idempotency-Key` if the client sent
none: the database then knows the second one. What remains is refused, with an error that says that it may have been done.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import replace

from deploy.ray.call import Call
from server.errors import EngineNotReady, ServerError, ShuttingDown, Unavailable

KEY = b"idempotency-key"
# routes of POST that honour an Idempotency-Key
KEYED = re.compile(r"/v1/support_sets(/import|/[^/]+/examples)?")
# routes of POST that make something, and know no such key
UNSAFE = re.compile(r"/v1/support_sets/[^/]+/evaluate|/v1/keys")
# refusals of a replica that is about to stop or has no engine, before any work: the request goes to another one
REFUSALS = frozenset({ShuttingDown.code, EngineNotReady.code})
MAX_ATTEMPTS = 4


class ReplicaLost(Unavailable, code="replica_lost"):
    """The replica that had this request was lost, and the request may not be repeated, or was too often."""

    # the request may have been done, or may have killed the replicas
    is_retryable = False


def with_key(call: Call) -> Call:
    """Return the request with an `Idempotency-Key`, if its route honours one and the client has sent none."""
    is_keyed = call.method == "POST" and KEYED.fullmatch(call.path) is not None
    if not is_keyed or any(name == KEY for name, _ in call.headers):
        return call
    return replace(call, headers=(*call.headers, (KEY, f"gateway-{uuid.uuid4().hex}".encode())))


def may_repeat(call: Call) -> bool:
    """Return whether a request may be sent again although its first replica may have done it.

    PATCH sets values, and DELETE removes: both do the same again, though a repeated DELETE may find nothing. With an
    expected version the second one would be refused, although the first one was done.
    """
    if call.method in ("PATCH", "DELETE"):
        return b"expected_version" not in call.body + call.query_string
    return not (call.method == "POST" and UNSAFE.fullmatch(call.path))


def lost(call: Call) -> ServerError:
    if may_repeat(call):
        return ReplicaLost(f"{call.attempt + 1} replicas in turn were lost while they had this request")
    return ReplicaLost("the replica that had this request was lost: look whether the request was done")
