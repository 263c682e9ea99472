"""Evaluations during which workers or servers die: some are resumed, and those that may be the cause are ended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.api.services import Services
from server.errors import EngineDied
from server.fewshot import retrieval
from server.media.source import EncodedMedia
from server.quality import evaluation_runner, evaluation_store
from server.quality.evaluation_store import Evaluation, Evaluations
from server.store.database import Database
from server.wire import Score
from tests.server.evaluations import EXAMPLES, MEDIA, logprobs_of, run_evaluation
from tests.server.fakes import FakeClient

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
        self, http: httpx.AsyncClient, client: FakeClient, app: FastAPI, fields: dict[str, Any]
    ) -> None:
        """As when requests of clients kill them."""
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

        client.embed, client.embed_text = dies_after(client.embed), dies_after(client.embed_text)  # type: ignore[method-assign]
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

    async def test_an_evaluation_fails_after_three_of_them(self, evaluations: Evaluations) -> None:
        created = await evaluations.create("a", 1, {})
        for server in ("first", "second", "third"):
            assert (await self.claimed(evaluations, server)).status == "running"
        assert await evaluations.claim("fourth") is None
        ended = await evaluations.get(created.id)
        assert (ended.status, ended.error and ended.error["code"]) == ("failed", "engine_died")
        assert ended.finished_at is not None

    async def test_a_finished_cell_is_progress(self, evaluations: Evaluations) -> None:
        for index, server in enumerate(("first", "second", "third", "fourth")):
            if not index:
                await evaluations.create("a", 1, {})
            evaluation = await self.claimed(evaluations, server)
            assert await evaluations.finish_cell(evaluation.id, server, index, {"status": "failed"}, 1)
        assert (await self.claimed(evaluations, "fifth")).status == "running"

    async def test_servers_that_release_it_are_not_counted(self, evaluations: Evaluations) -> None:
        await evaluations.create("a", 1, {})
        for server in ("first", "second", "third", "fourth"):
            await self.claimed(evaluations, server)
            await evaluations.release(server)
        for _ in range(4):  # nor one that claims its own evaluation again, as after an outage of the database
            await self.claimed(evaluations, "fifth")
