"""API keys, for administrators: the calls of `/v1/keys`, their replies, and the resource of each client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypedDict

from flamboyance_client.api import Call, checked_options, json_reader
from flamboyance_client.async_resources import Send as AsyncSend
from flamboyance_client.records import Page, is_deleted
from flamboyance_client.replies import Json, required
from flamboyance_client.resources import Send
from flamboyance_client.stored import resource_path

Role = Literal["inference", "manage", "admin"]
PATH = "/v1/keys"


class KeyLimits(TypedDict, total=False):
    """The amounts that a key may use in a minute, and the number of support sets that its tenant may have."""

    requests: int | None
    tokens: int | None
    bytes: int | None
    media: int | None
    support_sets: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """An API key. Only the reply that creates it has its `secret`, which is not part of its `repr`."""

    id: str
    name: str
    role: Role
    tenant: str | None = None
    limits: Mapping[str, int | None] = field(default_factory=dict)
    secret: str | None = field(default=None, repr=False)
    raw: Json = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, values: Json) -> Self:
        return cls(
            id=required(values, "id", str, "key"),
            name=required(values, "name", str, "key"),
            role=required(values, "role", str, "key"),
            tenant=values.get("tenant"),
            limits=values.get("limits") or {},
            secret=values.get("key"),
            raw=values,
        )


class KeyCalls:
    """Builds the calls of `/v1/keys`."""

    def create(self, name: str, role: Role, tenant: str | None, limits: KeyLimits | None) -> Call[ApiKey]:
        body: dict[str, Any] = {"name": name, "role": role}
        if tenant is not None:
            body["tenant"] = tenant
        if limits is not None:
            body["limits"] = checked_options(KeyLimits, limits)
        read = json_reader(ApiKey.parse)
        return Call(method="POST", path=PATH, body=body, read=read, can_run_twice=False)

    def list(self) -> Call[Page[ApiKey]]:
        read = json_reader(lambda values: Page[ApiKey].parse(values, ApiKey.parse))
        return Call(method="GET", path=PATH, read=read)

    def revoke(self, key_id: str) -> Call[bool]:
        return Call(method="DELETE", path=resource_path("keys", key_id), read=json_reader(is_deleted))


class Keys:
    """The API keys of a server. All calls need a key with the role `admin`."""

    def __init__(self, send: Send) -> None:
        self._calls, self._send = KeyCalls(), send

    def create(
        self, name: str, *, role: Role = "inference", tenant: str | None = None, limits: KeyLimits | None = None
    ) -> ApiKey:
        """Make a key, whose `secret` is in this reply alone."""
        return self._send(self._calls.create(name, role, tenant, limits))

    def list(self) -> Page[ApiKey]:
        return self._send(self._calls.list())

    def revoke(self, key_id: str) -> bool:
        return self._send(self._calls.revoke(key_id))


class AsyncKeys:
    """The API keys of a server. All calls need a key with the role `admin`."""

    def __init__(self, send: AsyncSend) -> None:
        self._calls, self._send = KeyCalls(), send

    async def create(
        self, name: str, *, role: Role = "inference", tenant: str | None = None, limits: KeyLimits | None = None
    ) -> ApiKey:
        """Make a key, whose `secret` is in this reply alone."""
        return await self._send(self._calls.create(name, role, tenant, limits))

    async def list(self) -> Page[ApiKey]:
        return await self._send(self._calls.list())

    async def revoke(self, key_id: str) -> bool:
        return await self._send(self._calls.revoke(key_id))
