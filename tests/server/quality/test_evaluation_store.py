"""The order in which evaluations run, and the cost of a full queue."""

from __future__ import annotations

import itertools
import time

import pytest

from server.errors import ClientOverShare, Overloaded
from server.quality import evaluation_store
from server.quality.evaluation_records import Evaluation
from server.quality.evaluation_store import LEASE_SECONDS, Evaluations
from server.store import database as database_module
from server.store.database import Database
from tests.server.store.conftest import Clock

pytestmark = pytest.mark.anyio


@pytest.fixture
def evaluations(database: Database, monkeypatch: pytest.MonkeyPatch) -> Evaluations:
    """Each transaction takes a second."""
    seconds = itertools.count(1_000_000)
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))
    numbers = itertools.count()
    monkeypatch.setattr(evaluation_store, "new_id", lambda prefix, _: f"{prefix}{next(numbers):04}")
    return Evaluations(database)


async def test_support_sets_take_turns(evaluations: Evaluations) -> None:
    for support_set in ("many", "many", "many", "few", "late"):
        await evaluations.create(support_set, 1, {})
    begun = []
    while (evaluation := await evaluations.claim("server")) is not None:
        begun.append(evaluation.id.removeprefix("eval_"))
        await evaluations.finish(evaluation.id, "server", "completed", 0)
    assert begun == ["0000", "0003", "0004", "0001", "0002"]


async def test_models_of_one_database_run_and_follow_their_own_evaluations(database: Database) -> None:
    first, second, alone = Evaluations(database, "first"), Evaluations(database, "second"), Evaluations(database)
    old, mine = await alone.create("a", 1, {}), await first.create("a", 1, {})
    for evaluations, expected in ((second, [old.id]), (first, [mine.id])):
        claimed = []
        while (evaluation := await evaluations.claim("server")) is not None:
            claimed.append(evaluation.id)
            await evaluations.finish(evaluation.id, "server", "completed", 0)
        assert claimed == expected
    latest = [await evaluations.latest("a", 1) for evaluations in (first, second, alone)]
    assert [evaluation and evaluation.id for evaluation in latest] == [mine.id, old.id, mine.id]


async def test_the_latest_evaluation_is_the_last_one_also_if_the_clock_was_set_back(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations, clock, created = Evaluations(database), Clock(), list[str]()
    monkeypatch.setattr(database_module, "time", clock)
    for seconds in (3600, -3600, 0):
        clock.now += seconds
        created.append((await evaluations.create("a", 1, {})).id)
        assert await evaluations.claim("server") is not None
        await evaluations.finish(created[-1], "server", "completed", 0)
        latest = await evaluations.latest("a", 1)
        assert latest is not None
        assert latest.id == created[-1]
    assert [evaluation.id for evaluation in await evaluations.page("a", created[0], 9)] == created[1:]


async def test_an_interrupted_evaluation_is_next(evaluations: Evaluations, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = await evaluations.create("a", 1, {})
    assert await evaluations.claim("server that dies") is not None
    await evaluations.create("b", 1, {})
    now = time.time() + LEASE_SECONDS
    monkeypatch.setattr(time, "time", lambda: now)
    claimed = await evaluations.claim("another")
    assert claimed is not None
    assert claimed.id == interrupted.id


async def test_a_lease_from_before_a_clock_was_set_back_is_free(
    evaluations: Evaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = await evaluations.create("a", 1, {})
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86400)
    assert await evaluations.claim("server that dies") is not None
    monkeypatch.setattr(time, "time", lambda: now + 86395)  # servers' clocks may differ a little
    assert await evaluations.claim("another") is None
    monkeypatch.setattr(time, "time", lambda: now)
    claimed = await evaluations.claim("another")
    assert claimed is not None
    assert claimed.id == created.id


async def test_a_renewal_that_is_committed_late_leaves_the_progress_complete(evaluations: Evaluations) -> None:
    evaluation = await evaluations.create("a", 1, {})
    assert await evaluations.claim("server") is not None
    assert await evaluations.finish_cell(evaluation.id, "server", 0, {"status": "failed"}, 30)
    assert await evaluations.renew(evaluation.id, "server", 24)
    await evaluations.finish(evaluation.id, "server", "completed", 30)
    assert not await evaluations.renew(evaluation.id, "server", 24)
    assert (await evaluations.get(evaluation.id)).queries_done == 30


async def test_a_cell_that_was_committed_late_is_finished_once_more(evaluations: Evaluations) -> None:
    evaluation = await evaluations.create("a", 1, {})
    assert await evaluations.claim("server") is not None
    for error in ("of the transaction that was given up", "of the next one"):
        assert await evaluations.finish_cell(evaluation.id, "server", 0, {"status": "failed", "error": error}, 3)
    (cell,) = (await evaluations.get(evaluation.id)).cells.values()
    assert cell["error"] == "of the next one"


async def test_a_full_queue_refuses_without_the_database(
    evaluations: Evaluations, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_store, "MAX_UNFINISHED", 2)
    first, _ = [await evaluations.create("a", 1, {}) for _ in range(2)]
    with pytest.raises(Overloaded):
        await evaluations.create("a", 1, {})
    with monkeypatch.context() as broken:
        broken.setattr(database, "write", None)
        with pytest.raises(Overloaded):
            await evaluations.create("a", 1, {})
        with pytest.raises(Overloaded):
            evaluations.check_room("")
    await evaluations.cancel(first.id)
    evaluations.check_room("")
    await evaluations.create("a", 1, {})


async def test_one_client_cannot_have_all_unfinished_evaluations(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_store, "MAX_UNFINISHED", 8)
    evaluations = Evaluations(database, max_share=0.75)
    created = [await evaluations.create("a", 1, {}, "greedy") for _ in range(6)]
    with pytest.raises(ClientOverShare):
        await evaluations.create("a", 1, {}, "greedy")
    with pytest.raises(ClientOverShare):
        evaluations.check_room("greedy")
    evaluations.check_room("other")
    await evaluations.create("a", 1, {}, "other")
    await evaluations.cancel(created[0].id)
    await evaluations.cancel(created[1].id)
    await evaluations.create("a", 1, {}, "greedy")


async def test_the_servers_of_a_database_count_the_share_of_a_client_together(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_store, "MAX_UNFINISHED", 4)
    for _ in range(3):
        await Evaluations(database).create("a", 1, {}, "client")
    another_server = Evaluations(database, max_share=0.75)
    with pytest.raises(ClientOverShare):
        await another_server.create("a", 1, {}, "client")
    await another_server.create("a", 1, {}, "other")


async def test_a_full_queue_is_asked_again_after_a_while(
    evaluations: Evaluations, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_store, "MAX_UNFINISHED", 1)
    monkeypatch.setattr(evaluation_store, "REFUSED_SECONDS", 0.0)
    first = await evaluations.create("a", 1, {})
    with pytest.raises(Overloaded):
        await evaluations.create("a", 1, {})
    await Evaluations(database).cancel(first.id)  # as another server does
    await evaluations.create("a", 1, {})


async def test_a_page_has_no_plans_but_the_lengths_of_their_lists(database: Database) -> None:
    """The plans of a page may have a gigabyte: 10,000 queries each, with their answers."""
    evaluations = Evaluations(database)
    created = await evaluations.create("a", 1, {"settled": {"cells": [{}, {}], "queries": ["e1", "e2", "e3"]}})
    await evaluations.create("b", 1, {})
    page = await evaluations.page(None, "", 9)
    assert not any(isinstance(evaluation, Evaluation) for evaluation in page)
    assert [(each.num_cells, each.num_queries) for each in (created, *page)] == [(2, 3), (2, 3), (0, 0)]
