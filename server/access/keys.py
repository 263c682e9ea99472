"""API keys in the database: made, listed and revoked by administrators, looked up for each request in memory.

A key is a random text that is shown once; the database has its SHA-256 alone. A key that another server, or the command
`flamboyance keys`, has made or revoked is noticed within `REFRESH_SECONDS`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import JSON, String, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from server.access.quotas import Limits
from server.access.roles import Role
from server.errors import DatabaseUnavailable, KeyNotFound
from server.store.database import Base, Database, new_id

ID_PREFIX, SECRET_PREFIX = "key_", "fl-"
NUM_SECRET_BYTES = 32
REFRESH_SECONDS = 5.0
# after which the database is asked again for a key that it did not have
MISSING_SECONDS = 1.0

logger = logging.getLogger(__name__)


class KeyRow(Base):
    """An API key, by the SHA-256 of its secret."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    role: Mapped[str] = mapped_column(String(16))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    limits: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """An API key without its secret."""

    id: str
    name: str
    role: Role
    limits: Limits
    created_at: float


class Keys:
    """The API keys of a database."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._clock = clock
        self._loading = asyncio.Lock()
        self._by_digest: Mapping[str, Key] | None = None
        self._loaded_at = 0.0

    async def create(self, name: str, role: Role, limits: Limits | None = None) -> tuple[Key, str]:
        """Make a key, and return it with its secret, which cannot be read again. Raises `DatabaseUnavailable`."""
        secret = SECRET_PREFIX + secrets.token_urlsafe(NUM_SECRET_BYTES)

        def add(session: Session, now: float) -> Key:
            row = KeyRow(
                id=new_id(ID_PREFIX),
                name=name,
                role=role,
                digest=digest(secret),
                limits=msgspec.to_builtins(limits or Limits()),
                created_at=now,
            )
            session.add(row)
            session.flush()
            return _key(row)

        key = await self._database.write(add)
        self._by_digest = None
        return key, secret

    async def all(self) -> list[Key]:
        """Return all keys, oldest first. Raises `DatabaseUnavailable`."""
        return list((await self._database.read(_load)).values())

    async def revoke(self, key_id: str) -> Key:
        """Delete a key, and return it. Raises `KeyNotFound` and `DatabaseUnavailable`."""

        def delete(session: Session, now: float) -> Key:
            row = session.get(KeyRow, key_id)
            if row is None:
                raise KeyNotFound(f"no API key has the id {key_id[:80]!r}")
            session.delete(row)
            return _key(row)

        key = await self._database.write(delete)
        self._by_digest = None
        return key

    async def find(self, secret: str) -> Key | None:
        """Return the key of a secret. Raises `DatabaseUnavailable` if the keys have never been read."""
        of_secret = digest(secret)
        key = (await self._recent(REFRESH_SECONDS)).get(of_secret)
        return key or (await self._recent(MISSING_SECONDS)).get(of_secret)

    async def exist(self) -> bool:
        """Return whether there is a key. Raises `DatabaseUnavailable` if the keys have never been read."""
        return bool(await self._recent(REFRESH_SECONDS))

    async def _recent(self, max_age: float) -> Mapping[str, Key]:
        """Return the keys by digest, read at most `max_age` seconds ago, or earlier while the database is unavailable."""
        if self._by_digest is not None and self._clock() - self._loaded_at < max_age:
            return self._by_digest
        async with self._loading:  # those that waited find what the first one has read
            if self._by_digest is None or self._clock() - self._loaded_at >= max_age:
                await self._reload()
            assert self._by_digest is not None
            return self._by_digest

    async def _reload(self) -> None:
        try:
            self._by_digest = await self._database.read(_load)
        except DatabaseUnavailable:
            if self._by_digest is None:
                raise
            logger.warning("the API keys cannot be read; those read before are used")
        self._loaded_at = self._clock()


def digest(secret: str) -> str:
    """Return the SHA-256 of a secret. A random text of 256 bits needs no slower hash."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _load(session: Session, _now: float) -> dict[str, Key]:
    return {row.digest: _key(row) for row in session.scalars(select(KeyRow).order_by(KeyRow.id))}


def _key(row: KeyRow) -> Key:
    limits = msgspec.convert(row.limits, Limits)
    role = msgspec.convert(row.role, Role)
    return Key(id=row.id, name=row.name, role=role, limits=limits, created_at=row.created_at)
