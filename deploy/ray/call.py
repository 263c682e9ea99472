"""An HTTP request as plain data, which the gateway sends to a replica; the replica handles it as an ASGI server would.

Bodies are complete, so a gateway can send a request again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

from starlette.types import Scope

Header = tuple[bytes, bytes]
Routing = Literal["affinity", "round_robin", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request. `key` chooses its replica; `attempt`: how often it was sent before; `avoid`: the replicas that had it."""

    method: str
    path: str
    raw_path: bytes
    query_string: bytes
    headers: tuple[Header, ...]
    client: tuple[str, int] | None
    scheme: str
    body: bytes = field(repr=False)
    key: str | None = None
    routing: Routing = "affinity"
    attempt: int = 0
    avoid: frozenset[str] = frozenset()

    @classmethod
    def from_scope(cls, scope: Scope, body: bytes, **fields: Any) -> Call:
        return cls(
            method=scope["method"],
            path=scope["path"],
            raw_path=scope.get("raw_path") or scope["path"].encode(),
            query_string=scope["query_string"],
            headers=tuple(cast(list[Header], scope["headers"])),
            client=tuple(scope["client"]) if scope.get("client") else None,
            scheme=scope.get("scheme", "http"),
            body=body,
            **fields,
        )

    def scope(self) -> Scope:
        """Return the ASGI scope of the request."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "path": self.path,
            "raw_path": self.raw_path,
            "root_path": "",
            "query_string": self.query_string,
            "headers": list(self.headers),
            "client": self.client,
            "server": None,
            "scheme": self.scheme,
            "state": {},
        }
