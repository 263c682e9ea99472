"""Warmed versions are remembered with their prompts, up to a number of tokens."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

from server.fewshot import warming
from server.store.records import SupportSetInfo
from server.store.support_sets import SupportSets
from tests.server.colours import app, colours, example, settings, support_sets
from tests.server.fewshot.test_warming import warm

__all__ = ["app", "colours", "settings", "support_sets"]  # fixtures

pytestmark = pytest.mark.anyio


async def test_remembered_prompts_have_a_limit(
    http: httpx.AsyncClient,
    app: FastAPI,
    colours: SupportSetInfo,
    support_sets: SupportSets,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await support_sets.create("second", [example(0), example(1)])
    alone = {"template": "caption", "shots_attend": "alone"}
    for name in ("colours", "second"):
        assert (await warm(http, name, **alone))["status"] == "ready"
    num_tokens = sum(entry.target.num_tokens for entry in app.state.services.warming._entries.values())
    assert num_tokens >= 8 * 10
    monkeypatch.setattr(warming, "MAX_REMEMBERED_TOKENS", num_tokens)
    assert (await http.get("/v1/support_sets/colours")).json()["status"] == "ready"
    await support_sets.create("third", [example(2)])
    await warm(http, "third", **alone)
    sets = (await http.get("/v1/support_sets")).json()["data"]
    assert {each["name"]: each["status"] for each in sets} == {
        "colours": "pending",
        "second": "ready",
        "third": "ready",
    }
    remembered = app.state.services.warming
    assert remembered._num_tokens == sum(entry.target.num_tokens for entry in remembered._entries.values())


async def test_many_remembered_prompts_are_counted_once(
    app: FastAPI,
    http: httpx.AsyncClient,
    colours: SupportSetInfo,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tenant may have thousands of remembered versions: to count them again would stop the event loop for seconds."""
    counted = 0

    def num_tokens(target: warming.WarmTarget) -> int:
        nonlocal counted
        counted += 1
        return 1000

    monkeypatch.setattr(warming.WarmTarget, "num_tokens", property(num_tokens))
    for _ in range(4):
        await warm(http, template="caption", k=2)
        await app.state.services.warming.stop()
    assert counted <= 4
