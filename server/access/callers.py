"""Callers: the senders of requests, identified by API keys, each with a role and a quota.

A server without any key is open: every caller has all rights except to manage keys. The setting `api_key` is a key of the
default tenant with the role `admin`.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from server.access.keys import Keys, digest
from server.access.quotas import Limits, Quota, Quotas
from server.access.roles import Role
from server.access.tenants import DEFAULT_TENANT

NO_LIMITS = Limits()
OF_SETTING = "api_key"


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The sender of a request. Callers with the same `client`, a key of the database or else an address, share limits.

    `key` is the id of its key: `api_key` for the setting, empty for a caller without a key.
    """

    client: str
    role: Role
    tenant: str = DEFAULT_TENANT
    limits: Limits = NO_LIMITS
    quota: Quota | None = None
    key: str = ""

    @property
    def is_anonymous(self) -> bool:
        return not self.key


class Callers:
    """Identifies callers by the setting `api_key` and the keys of the database."""

    def __init__(self, keys: Keys, api_key: str | None = None, *, require_key: bool = False) -> None:
        self._keys = keys
        self._require_key = require_key
        self._digest = None if api_key is None else digest(api_key)
        self._quotas = Quotas()

    async def identify(self, authorization: str, address: str) -> Caller | None:
        """Return the caller of an `Authorization` header, None if it has no valid key. Raises `DatabaseUnavailable`."""
        scheme, _, secret = authorization.partition(" ")
        if scheme.lower() == "bearer" and (secret := secret.strip()):
            if self._digest is not None and hmac.compare_digest(digest(secret), self._digest):
                return Caller(client=address, role="admin", key=OF_SETTING)
            # keys are looked up by digest, so the time of a lookup reveals nothing about them
            if (key := await self._keys.find(secret)) is not None:
                return Caller(
                    client=key.id,
                    role=key.role,
                    tenant=key.tenant,
                    limits=key.limits,
                    quota=self._quotas.of(key.id, key.limits),
                    key=key.id,
                )
        if self._digest is None and not self._require_key and not await self._keys.exist():
            return Caller(client=address, role="admin")
        return None
