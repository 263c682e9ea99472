"""API keys: made once, stored as digests, noticed by other servers, and usable while the database is away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from server.access.callers import Callers
from server.access.keys import MISSING_SECONDS, REFRESH_SECONDS, AnyKey, Key, KeyRow, Keys, _load
from server.access.quotas import Limits
from server.access.roles import ROLES, Role
from server.errors import DatabaseUnavailable, KeyNotFound, LastKey
from server.store.database import Database
from tests.server.fakes import Clock

pytestmark = pytest.mark.anyio


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(database: Database, clock: Clock) -> Keys:
    return Keys(database, clock)


async def test_a_key_is_found_by_its_secret(keys: Keys) -> None:
    key, secret = await keys.create("team", "manage", Limits(requests=5))
    other, _ = await keys.create("other", "inference")
    assert await keys.find(secret) == key
    assert await keys.find(secret + "x") is None
    assert await keys.find(key.id) is None
    assert await keys.all() == [key, other]
    assert key.limits == Limits(requests=5)


async def test_the_database_does_not_have_the_secret(keys: Keys, database: Database) -> None:
    _, secret = await keys.create("team", "admin")
    rows = await database.read(lambda session, now: session.execute(text("SELECT * FROM api_keys")).all())
    assert len(rows) == 1
    assert secret not in str(rows)
    assert secret.removeprefix("fl-") not in str(rows)


async def test_secrets_differ_and_are_long(keys: Keys) -> None:
    secrets = {(await keys.create("team", "inference"))[1] for _ in range(20)}
    assert len(secrets) == 20
    assert min(map(len, secrets)) >= len("fl-") + 43  # 256 bits


async def test_a_revoked_key_is_refused_at_once(keys: Keys) -> None:
    key, secret = await keys.create("team", "inference")
    assert await keys.find(secret) is not None
    assert await keys.revoke(key.id, may_be_last=True) == key
    assert await keys.find(secret) is None
    with pytest.raises(KeyNotFound):
        await keys.revoke(key.id, may_be_last=True)


async def test_the_last_key_is_kept(keys: Keys) -> None:
    first, _ = await keys.create("a", "admin")
    second, _ = await keys.create("b", "inference")
    await keys.revoke(first.id, may_be_last=False)
    with pytest.raises(LastKey):
        await keys.revoke(second.id, may_be_last=False)
    assert await keys.exist()


async def test_another_server_notices_new_and_revoked_keys(keys: Keys, database: Database, clock: Clock) -> None:
    other = Keys(database, clock)
    assert not await other.exist()
    key, secret = await keys.create("team", "inference")
    clock.now += MISSING_SECONDS
    assert await other.find(secret) == key
    await keys.revoke(key.id, may_be_last=True)
    clock.now += REFRESH_SECONDS
    assert await other.find(secret) is None


async def test_keys_that_were_read_before_a_change_are_read_again(
    keys: Keys, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first read is under way while a key is made: the request that waits for it finds the key."""
    read, numbers = database.read, list[int]()

    async def change_meanwhile(transaction: Callable[..., Any]) -> Any:
        result = await read(transaction)
        if not numbers:
            numbers.append(1)
            made.append(await keys.create("team", "inference"))
        return result

    made: list[tuple[Key, str]] = []
    monkeypatch.setattr(database, "read", change_meanwhile)
    assert await keys.exist()
    ((key, secret),) = made
    assert await keys.find(secret) == key


async def test_unknown_secrets_do_not_load_the_database(
    keys: Keys, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await keys.exist()
    monkeypatch.setattr(database, "read", None)
    for number in range(100):
        assert await keys.find(f"guess {number}") is None


async def test_the_rows_of_keys_are_read_again_only_after_a_change(
    keys: Keys, database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong secret causes a read each second, and there may be many keys."""
    reads: list[int] = []

    def load(session: Session, now: float) -> dict[str, Key | None]:
        loaded = _load(session, now)
        reads.append(len(loaded))
        return loaded

    monkeypatch.setattr("server.access.keys._load", load)
    other = Keys(database, clock)
    first, _ = await keys.create("first", "inference")
    for change, expected in (
        (None, [1]),
        (None, [1]),
        (lambda: keys.create("second", "inference"), [1, 2]),
        (None, [1, 2]),
        (lambda: keys.revoke(first.id, may_be_last=True), [1, 2, 1]),
    ):
        if change is not None:
            await change()
        clock.now += REFRESH_SECONDS
        assert await other.find("guess") is None
        assert reads == expected


async def test_keys_outlast_the_database(
    keys: Keys, database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, secret = await keys.create("team", "inference")
    assert await keys.exist()

    async def fail(transaction: object) -> None:
        raise DatabaseUnavailable("away")

    monkeypatch.setattr(database, "read", fail)
    clock.now += 1000
    assert await keys.find(secret) == key
    assert await keys.find("another") is None
    with pytest.raises(DatabaseUnavailable):  # rather than let everybody in
        await Keys(database, clock).exist()


async def test_a_lost_database_opens_no_server(keys: Keys, database: Database, clock: Clock) -> None:
    await keys.create("team", "inference")
    assert await Callers(keys).identify("", "") is None
    await database.write(lambda session, now: session.execute(text("DELETE FROM api_keys")))
    clock.now += REFRESH_SECONDS
    assert await Callers(keys).identify("", "") is None
    assert await Callers(Keys(database, clock), require_key=True).identify("", "") is None


async def test_keys_are_read_while_the_server_itself_reads_large_sets(keys: Keys, database: Database) -> None:
    released = threading.Event()
    reading = [asyncio.create_task(database.read(lambda session, now: released.wait(60))) for _ in range(8)]
    await asyncio.sleep(0.1)  # as many as may run do
    try:
        assert not await asyncio.wait_for(keys.exist(), 10)
    finally:
        released.set()
        await asyncio.gather(*reading)


async def test_known_keys_do_not_wait_for_a_database_that_hangs(
    keys: Keys, database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, secret = await keys.create("team", "inference")
    assert await keys.find(secret) == key

    async def hang(transaction: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(database, "read", hang)
    clock.now += REFRESH_SECONDS
    async with asyncio.timeout(5):
        assert await asyncio.gather(*(keys.find(secret) for _ in range(20))) == [key] * 20


@pytest.mark.parametrize("role", ROLES)
async def test_a_server_that_knows_no_tenants_does_not_understand_their_keys(
    keys: Keys, database: Database, role: Role
) -> None:
    """Two versions of the server share a database while one replaces the other."""
    key, secret = await keys.create("x", role, tenant="acme")
    assert (await Keys(database).find(secret)) == key
    stored = await database.read(lambda session, now: session.scalar(select(KeyRow.role)))
    assert stored not in ROLES


async def test_a_key_that_only_a_newer_server_understands_permits_nothing(keys: Keys, database: Database) -> None:
    key, secret = await keys.create("team", "admin", tenant="acme")
    await database.write(lambda session, now: session.execute(text("UPDATE api_keys SET role = 'tenant/emperor'")))
    older = Keys(database)
    assert await older.find(secret) is None
    assert await older.exist()
    assert await older.all() == []
    assert await older.revoke(key.id, may_be_last=True) == AnyKey(id=key.id, name="team", role="emperor", tenant="acme")
    assert not await Keys(database).exist()


async def test_callers(keys: Keys) -> None:
    open_server = await Callers(keys).identify("", "10.0.0.1")
    assert open_server is not None
    assert (open_server.role, open_server.is_anonymous, open_server.client) == ("admin", True, "10.0.0.1")
    assert open_server.key == ""
    key, secret = await keys.create("team", "inference", Limits(tokens=10))
    assert await Callers(keys).identify("", "10.0.0.1") is None
    caller = await Callers(keys, "the setting").identify(f"Bearer {secret}", "10.0.0.1")
    assert caller is not None
    assert (caller.role, caller.client, caller.key, caller.is_anonymous) == ("inference", key.id, key.id, False)
    of_setting = await Callers(keys, "the setting").identify("bearer the setting", "10.0.0.1")
    assert of_setting is not None
    assert (of_setting.role, of_setting.quota, of_setting.key) == ("admin", None, "api_key")
    assert of_setting.client == "10.0.0.1"
    for header in ("", "Bearer", "Bearer ", f"Basic {secret}", secret, f"Bearer {secret}x", "Bearer the settin"):
        assert await Callers(keys, "the setting").identify(header, "") is None
