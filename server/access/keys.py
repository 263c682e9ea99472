"""API keys: administrators create, list and revoke them in the database; each request looks its key up in memory.

A key is a random text that is shown once; the database has only its SHA-256. When another server or the command
`flamboyance keys` creates or revokes a key, this server notices within `REFRESH_SECONDS`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, Literal

import msgspec
from sqlalchemy import JSON, String, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from server.access.quotas import Limits
from server.access.roles import Role
from server.access.tenants import DEFAULT_TENANT
from server.errors import DatabaseUnavailable, KeyNotFound, LastKey
from server.limits.turns import client_in_turn
from server.store.database import Base, Database, new_id

ID_PREFIX, SECRET_PREFIX = "key_", "fl-"
NUM_SECRET_BYTES = 32
REFRESH_SECONDS = 5.0
# seconds after which an unknown key is looked up in the database again
MISSING_SECONDS = 1.0
# seconds for which a request waits for the database before the keys that were read last are used
MAX_WAIT_SECONDS = 0.5
# older servers have only one tenant and do not know such a role, so the key permits nothing there
OF_TENANT = "tenant/"

logger = logging.getLogger(__name__)


class KeyRow(Base):
    """An API key, by the SHA-256 of its secret. For a tenant other than the default one, the role has a prefix."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    role: Mapped[str] = mapped_column(String(16))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    limits: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[float]
    tenant: Mapped[str] = mapped_column(String(48), server_default="")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyKey:
    """The part of an API key that each version of the server understands; its role may be that of a newer one."""

    id: str
    name: str
    role: str
    tenant: str = DEFAULT_TENANT


@dataclass(frozen=True, slots=True, kw_only=True)
class Key(AnyKey):
    """An API key without its secret."""

    role: Role
    limits: Limits
    created_at: float


class Keys:
    """The API keys of a database."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._clock = clock
        self._by_digest: Mapping[str, Key | None] | None = None  # None: a key that only a newer server understands
        self._loaded_at = -inf
        self._loading: asyncio.Task[None] | None = None
        self._num_changes = 0
        self._have_existed = False

    async def create(
        self, name: str, role: Role, limits: Limits | None = None, *, tenant: str = DEFAULT_TENANT
    ) -> tuple[Key, str]:
        """Create a key, and return it with its secret, which cannot be read again. Raises `DatabaseUnavailable`."""
        secret = SECRET_PREFIX + secrets.token_urlsafe(NUM_SECRET_BYTES)

        def add(session: Session, now: float) -> Key:
            row = KeyRow(
                id=new_id(ID_PREFIX),
                name=name,
                role=OF_TENANT + role if tenant else role,
                digest=digest(secret),
                limits=msgspec.to_builtins(limits or Limits()),
                created_at=now,
                tenant=tenant,
            )
            session.add(row)
            session.flush()
            return _key(row)

        try:
            return await self._database.write(add), secret
        finally:
            self._note_change()

    async def all(self, tenant: str = DEFAULT_TENANT) -> list[Key]:
        """Return the keys that a tenant manages, oldest first. Raises `DatabaseUnavailable`."""
        keys = (await self._database.read(_load)).values()
        return [key for key in keys if key is not None and manages(tenant, key.tenant)]

    async def revoke(self, key_id: str, *, may_be_last: bool, tenant: str = DEFAULT_TENANT) -> AnyKey:
        """Delete a key that `tenant` manages, and return it.

        The last key is deleted only if it `may_be_last`, because a server without keys is open.

        Raises `KeyNotFound`, `LastKey` and `DatabaseUnavailable`.
        """

        def delete(session: Session, now: float) -> AnyKey:
            rows = session.scalars(select(KeyRow).order_by(KeyRow.id).with_for_update()).all()
            row = next((row for row in rows if row.id == key_id), None)
            if row is None or not manages(tenant, row.tenant):
                raise KeyNotFound(f"no API key has the id {key_id[:80]!r}")
            if not may_be_last and len(rows) == 1:
                raise LastKey("this is the last key, and a server without keys is open: create another one first")
            session.delete(row)
            digests.append(row.digest)
            return _known(row) or AnyKey(id=row.id, name=row.name, role=_role(row), tenant=row.tenant)

        digests: list[str] = []
        try:
            return await self._database.write(delete)
        finally:
            self._note_change(*digests)

    async def find(self, secret: str) -> Key | None:
        """Return the key of a secret. Raises `DatabaseUnavailable` if the keys have never been read."""
        of_secret = digest(secret)
        key = (await self._recent(REFRESH_SECONDS)).get(of_secret)
        return key or (await self._recent(MISSING_SECONDS)).get(of_secret)

    async def exist(self) -> bool:
        """Return whether there is a key, or was one since this process began: losing the database must not open the server.

        Raises `DatabaseUnavailable` if the keys have never been read.
        """
        return bool(await self._recent(REFRESH_SECONDS)) or self._have_existed

    def _note_change(self, *revoked: str) -> None:
        """Have the keys read again for the next request; revoked digests become invalid at once."""
        self._num_changes += 1
        self._loaded_at = -inf
        if self._by_digest is not None:
            self._by_digest = {name: key for name, key in self._by_digest.items() if name not in revoked}

    async def _recent(self, max_age: float) -> Mapping[str, Key | None]:
        """Return the keys by digest, read at most `max_age` seconds ago, or earlier while the database does not respond."""
        if self._clock() - self._loaded_at >= max_age:
            if self._loading is None or self._loading.done():
                self._loading = asyncio.create_task(self._reload())
            # at first there are no earlier keys to use
            await asyncio.wait({self._loading}, timeout=None if self._by_digest is None else MAX_WAIT_SECONDS)
        if self._by_digest is None:
            raise DatabaseUnavailable("the API keys cannot be read")
        return self._by_digest

    async def _reload(self) -> None:
        client_in_turn.set("API keys")  # neither a single client nor the server itself delays the reads of keys
        try:
            by_digest = await self._read_after_changes()
        except DatabaseUnavailable:
            logger.warning("the API keys cannot be read; the keys that were read last are used")
        else:
            self._by_digest = by_digest
            self._have_existed |= bool(by_digest)
        self._loaded_at = self._clock()

    async def _read_after_changes(self) -> Mapping[str, Key | None]:
        """Read the keys, and once more if this process changed them meanwhile. Raises `DatabaseUnavailable`."""
        while True:
            num_changes = self._num_changes
            by_digest = await self._database.read(partial(_load_changed, self._by_digest))
            if num_changes == self._num_changes:
                return by_digest


def manages(tenant: str, other: str) -> bool:
    """Return whether administrators of `tenant` manage the keys of `other`; those of the default tenant manage all keys."""
    return tenant in (DEFAULT_TENANT, other)


def log_change(change: Literal["made", "revoked"], key: AnyKey, by: str) -> None:
    """Log that a key was made or revoked; `by` is the id of the key that did it, or the name of a command."""
    fields = {"key": key.id, "role": key.role, "tenant": key.tenant or None, "by": by}
    logger.info("an API key was %s", change, extra=fields)


def card(key: Key) -> dict[str, Any]:
    """Return what clients may know about a key: not its secret."""
    return {
        "id": key.id,
        "object": "api_key",
        "name": key.name,
        "role": key.role,
        "tenant": key.tenant or None,
        "limits": msgspec.structs.asdict(key.limits),
        "created_at": key.created_at,
    }


def digest(secret: str) -> str:
    """Return the SHA-256 of a secret. A random text of 256 bits needs no slower hash."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _load(session: Session, _now: float) -> dict[str, Key | None]:
    return {row.digest: _known(row) for row in session.scalars(select(KeyRow).order_by(KeyRow.id))}


def _load_changed(known: Mapping[str, Key | None] | None, session: Session, now: float) -> Mapping[str, Key | None]:
    """Return the known keys if the database has the same ones, whose rows never change, or else read all of them.

    A wrong secret causes a read each second, and to read the rows of many keys takes much longer than their digests.
    """
    if known is not None and set(session.scalars(select(KeyRow.digest))) == known.keys():
        return known
    return _load(session, now)


def _known(row: KeyRow) -> Key | None:
    """Return the key of a row, or None for a key of a newer server's form, which permits nothing here."""
    try:
        return _key(row)
    except msgspec.ValidationError:
        logger.warning("an API key cannot be read by this version of the server", extra={"key": row.id})
        return None


def _key(row: KeyRow) -> Key:
    limits = msgspec.convert(row.limits, Limits)
    role = msgspec.convert(_role(row), Role)
    return Key(id=row.id, name=row.name, role=role, limits=limits, created_at=row.created_at, tenant=row.tenant)


def _role(row: KeyRow) -> str:
    return row.role.removeprefix(OF_TENANT)
