"""Evaluations during which workers or servers die: some are resumed, and those that may be the cause are ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.api.services import Services
from server.errors import EngineDied, Overloaded
from server.fewshot import retrieval
from server.media.source import EncodedMedia
from server.quality import evaluation_runner, evaluation_store
from server.quality.evaluation_records import Evaluation
from server.quality.evaluation_store import Evaluations
from server.store.database import Database
from server.wire import Score
from tests.server.evaluations import EXAMPLES, MEDIA, evaluate, logprobs_of, run_evaluation, running, wait_until_ended
from tests.server.fakes import FakeClient, eventually

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("num_deaths", "status"), [(2, "completed"), (3, "failed")])
async def test_an_evaluation_with_a_query_that_every_worker_dies_of_fails(
    http: httpx.AsyncClient,
    client: FakeClient,
    services: Services,
    monkeypatch: pytest.MonkeyPatch,
    num_deaths: int,
    status: str,
) -> None:
    monkeypatch.setattr(evaluation_runner, "FIRST_PAUSE", 0.0)
    deadly, died = "", 0

    def logprobs(request: Score, candidate: list[int]) -> list[float]:
        nonlocal deadly, died
        deadly = deadly or request.prompt.media[-1].hex()
        if request.prompt.media[-1].hex() == deadly and died < num_deaths:
            died += 1
            raise EngineDied("died")
        return logprobs_of(0.7, request, candidate)

    client.logprobs = logprobs
    evaluation = await run_evaluation(http, services, k=[1, 2], strategies=["first"], methods=["in_context"])
    assert (evaluation["status"], died) == (status, num_deaths)
    if status == "failed":
        assert evaluation["error"]["code"] == "engine_died"
        assert "3 workers died while they ran the same query" in evaluation["error"]["message"]
    following = await run_evaluation(http, services, k=[1], strategies=["first"], methods=["in_context"])
    assert following["status"] == "completed"


EMBEDDING = [{"methods": ["nearest_mean"]}, {"k": [1], "strategies": ["rices_text"], "methods": ["in_context"]}]


class TestEmbedding:
    """A set is embedded before queries, in batches of one example here."""

    @pytest.fixture(autouse=True)
    def batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(evaluation_runner, "FIRST_PAUSE", 0.0)
        monkeypatch.setattr(retrieval, "BATCH", 1)

    @pytest.mark.parametrize("fields", EMBEDDING, ids=["media", "texts"])
    async def test_an_evaluation_survives_the_deaths_of_workers_between_batches(
        self,
        http: httpx.AsyncClient,
        client: FakeClient,
        app: FastAPI,
        monkeypatch: pytest.MonkeyPatch,
        fields: dict[str, Any],
    ) -> None:
        """Requests of clients may have killed them."""
        examples = [replace(example, question=f"{example.id}?") for example in EXAMPLES]
        await app.state.services.support_sets.create("colours", examples)
        num_calls = 0

        def dies_after(embed: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
            async def embed_or_die(items: Any) -> Any:
                nonlocal num_calls
                num_calls += 1
                if num_calls % 2 == 0:
                    raise EngineDied("died")
                return await embed(items)

            return embed_or_die

        for name in ("embed", "embed_text"):
            monkeypatch.setattr(client, name, dies_after(getattr(client, name)))
        evaluation = await run_evaluation(http, app.state.services, **fields)
        assert (evaluation["status"], evaluation["error"]) == ("completed", None)
        assert num_calls >= 2 * len(EXAMPLES) - 1

    async def test_an_evaluation_with_a_batch_that_every_worker_dies_of_fails(
        self, http: httpx.AsyncClient, client: FakeClient, services: Services
    ) -> None:
        num_deaths, embed = 0, client.embed

        async def embed_or_die(media: Sequence[EncodedMedia]) -> Any:
            nonlocal num_deaths
            if MEDIA["blue"].digest in [item.digest for item in media]:
                num_deaths += 1
                raise EngineDied("died")
            return await embed(media)

        client.embed = embed_or_die  # type: ignore[method-assign]
        evaluation = await run_evaluation(http, services, methods=["nearest_mean"])
        assert (evaluation["status"], num_deaths) == ("failed", 3)
        message = "3 workers died while they embedded the same examples, which may need too much memory"
        assert evaluation["error"] == {"code": "engine_died", "message": message}


async def test_an_evaluation_whose_lease_has_ended_with_it_is_counted(
    http: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_runner, "RENEW_SECONDS", 0.02)
    finish = Evaluations.finish

    async def finish_slowly(*arguments: Any) -> None:
        await finish(*arguments)
        await asyncio.sleep(0.2)

    monkeypatch.setattr(Evaluations, "finish", finish_slowly)
    async with running(services):
        await wait_until_ended(http, (await evaluate(http, methods=["nearest_mean"]))["id"])
        await asyncio.sleep(0.4)
    counted = 'flamboyance:evaluations_total{model_name="tiny",status="completed"} 1.0'
    assert counted in (await http.get("/metrics")).text


class TestServersThatEnd:
    """Leases run out at once."""

    @pytest.fixture
    def evaluations(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> Evaluations:
        monkeypatch.setattr(evaluation_store, "LEASE_SECONDS", 0.0)
        return Evaluations(database)

    async def claimed(self, evaluations: Evaluations, holder: str) -> Evaluation:
        evaluation = await evaluations.claim(holder)
        assert evaluation is not None
        return evaluation

    async def test_an_evaluation_fails_after_three_of_them(
        self, http: httpx.AsyncClient, client: FakeClient, services: Services, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is counted, and leaves its room to clients that were refused."""
        monkeypatch.setattr(evaluation_store, "MAX_UNFINISHED", 1)
        monkeypatch.setattr(evaluation_store, "REFUSED_SECONDS", 3600.0)
        created = await evaluate(http, methods=["in_context"])
        with monkeypatch.context() as expired:
            expired.setattr(evaluation_store, "LEASE_SECONDS", 0.0)
            for server in ("first", "second", "third"):
                await self.claimed(services.evaluations, server)
        with pytest.raises(Overloaded):
            await services.evaluations.create("a", 1, {})
        async with running(services):
            ended = await wait_until_ended(http, created["id"])
            await eventually(lambda: not services.evaluations._refused)
        message = "3 servers ended while they ran the same cell, which may need too much memory"
        assert (ended["status"], ended["error"]) == ("failed", {"code": "engine_died", "message": message})
        assert ended["finished_at"] is not None
        assert not client.scores
        assert (
            'flamboyance:evaluations_total{model_name="tiny",status="failed"} 1.0' in (await http.get("/metrics")).text
        )

    async def test_an_evaluation_of_two_of_them_is_run(self, http: httpx.AsyncClient, services: Services) -> None:
        created = await evaluate(http, methods=["nearest_mean"])
        with pytest.MonkeyPatch.context() as expired:
            expired.setattr(evaluation_store, "LEASE_SECONDS", 0.0)
            for server in ("first", "second"):
                await self.claimed(services.evaluations, server)
        async with running(services):
            assert (await wait_until_ended(http, created["id"]))["status"] == "completed"

    async def test_an_evaluation_that_no_server_can_begin_delays_no_other_one(
        self, http: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(evaluation_runner, "POLL_SECONDS", 0.05)
        monkeypatch.setattr(evaluation_store, "LEASE_SECONDS", 0.5)
        broken = await services.evaluations.create("colours", 1, {})
        created = await evaluate(http, methods=["nearest_mean"])
        async with running(services):
            assert (await wait_until_ended(http, created["id"]))["status"] == "completed"
        assert (await services.evaluations.get(broken.id)).status == "running"

    async def test_a_finished_cell_is_progress(self, evaluations: Evaluations) -> None:
        await evaluations.create("a", 1, {})
        for index, server in enumerate(("first", "second", "third")):
            evaluation = await self.claimed(evaluations, server)
            assert evaluation.interruptions == min(index, 1)
            assert await evaluations.finish_cell(evaluation.id, server, index, {"status": "failed"}, 1)
        assert (await self.claimed(evaluations, "fourth")).interruptions == 1

    async def test_servers_that_release_it_are_not_counted(self, evaluations: Evaluations) -> None:
        await evaluations.create("a", 1, {})
        for server in ("first", "second", "third", "fourth"):
            assert (await self.claimed(evaluations, server)).interruptions == 0
            await evaluations.release(server)

    async def test_a_server_that_was_cut_off_is_counted_only_until_it_claims_again(
        self, evaluations: Evaluations
    ) -> None:
        """Outages of the database cut servers off; one that dies during the cell stays counted."""
        await evaluations.create("a", 1, {})
        claims = ("first", "second", "first", "second", "first", "dies", "second", "first", "second")
        counts = [(await self.claimed(evaluations, server)).interruptions for server in claims]
        assert counts == [0, 1, 1, 1, 1, 2, 2, 2, 2]

    async def test_a_server_that_gets_nothing_takes_its_interruption_back(
        self, evaluations: Evaluations, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        created = await evaluations.create("a", 1, {})
        await self.claimed(evaluations, "first")
        monkeypatch.setattr(evaluation_store, "LEASE_SECONDS", 3600.0)
        assert (await self.claimed(evaluations, "second")).interruptions == 1
        for _ in range(2):
            assert await evaluations.claim("first") is None
            assert (await evaluations.get(created.id)).interruptions == 0

    async def test_a_server_does_not_take_back_the_interruption_of_another_one(self, evaluations: Evaluations) -> None:
        """Its own was forgotten when the other server finished a cell."""
        await evaluations.create("a", 1, {})
        evaluation = await self.claimed(evaluations, "cut off")
        assert await evaluations.finish_cell(evaluation.id, "cut off", 0, {"status": "failed"}, 1)
        await self.claimed(evaluations, "dies")
        assert await evaluations.finish_cell(evaluation.id, "dies", 1, {"status": "failed"}, 2)
        assert (await self.claimed(evaluations, "third")).interruptions == 1
        assert (await self.claimed(evaluations, "cut off")).interruptions == 2

    async def test_a_server_resumes_its_own_evaluation_first_and_at_once(self, database: Database) -> None:
        """After a short outage of the database, its lease has not run out."""
        evaluations = Evaluations(database)
        created = [await evaluations.create("a", 1, {}) for _ in range(2)]
        await self.claimed(evaluations, "another")
        mine = await self.claimed(evaluations, "server")
        await evaluations.release("another")
        again = await self.claimed(evaluations, "server")
        assert (mine.id, again.id, again.interruptions) == (created[1].id, created[1].id, 0)
