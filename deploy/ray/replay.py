"""Decides which requests may be sent again after their replica was lost: it may have executed them.

A request that is sent twice must not be executed twice. Requests that only read or compute may always be repeated, and so
may uploads, whose ids depend only on their content. A request that creates something gets an `Idempotency-Key` if the
client sent none, by which the database recognises the repetition. Other requests are refused, with an error that says that
they may have been executed.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import replace
from urllib.parse import parse_qs

import msgspec

from deploy.ray.call import Call
from server.errors import EngineNotReady, ServerError, ShuttingDown, Unavailable

KEY = b"idempotency-key"
EXPECTED_VERSION = "expected_version"
# routes of POST that honour an Idempotency-Key
KEYED = re.compile(r"/v1/support_sets(/import|/[^/]+/examples)?")
# routes of POST that create something, and do not support such a key
UNSAFE = re.compile(r"/v1/support_sets/[^/]+/evaluate|/v1/keys")
# refusals of a replica that is about to stop or has no engine, before any work: the request goes to another one
REFUSALS = frozenset({ShuttingDown.code, EngineNotReady.code})
MAX_ATTEMPTS = 4


class ReplicaLost(Unavailable, code="replica_lost"):
    """The replica that had this request was lost, and the request may not be repeated, or was repeated too often."""

    # the request may have been executed, or may have killed the replicas
    is_retryable = False


def with_key(call: Call) -> Call:
    """Return the request with an `Idempotency-Key`, if its route honours one and the client has sent none."""
    is_keyed = call.method == "POST" and KEYED.fullmatch(call.path) is not None
    if not is_keyed or any(name == KEY for name, _ in call.headers):
        return call
    return replace(call, headers=(*call.headers, (KEY, f"gateway-{uuid.uuid4().hex}".encode())))


def may_repeat(call: Call) -> bool:
    """Return whether a request may be sent again although its first replica may have executed it.

    PATCH sets values and DELETE removes them, so repeating them has no further effect, though a repeated DELETE may find
    nothing. With an expected version, the second request would be refused although the first one succeeded.
    """
    if call.method in ("PATCH", "DELETE"):
        return not _may_expect_version(call)
    return not (call.method == "POST" and UNSAFE.fullmatch(call.path))


def _may_expect_version(call: Call) -> bool:
    """Return whether a request names the version that it expects, in whatever spelling, or has an unreadable body."""
    if EXPECTED_VERSION in parse_qs(call.query_string.decode("latin-1"), keep_blank_values=True):
        return True
    try:
        fields = msgspec.json.decode(call.body or b"{}")
    except (msgspec.DecodeError, RecursionError):
        return True
    return isinstance(fields, dict) and EXPECTED_VERSION in fields


def lost(call: Call) -> ServerError:
    if may_repeat(call):
        return ReplicaLost(f"{call.attempt + 1} replicas in turn were lost while they had this request")
    return ReplicaLost("the replica that had this request was lost: check whether the request was executed")
