"""The shots of POST /v1/classify from a support set: without a strategy, they have each label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.fewshot import prompting
from server.settings import Settings
from tests.server.conftest import data_url, png

pytestmark = pytest.mark.anyio

RED = data_url(png("red"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", max_media_per_request=32)


async def labels(http: httpx.AsyncClient, stored: Sequence[str], **fields: Any) -> list[str]:
    """Return the labels of the shots; the set has an example of each label that is given, in this order."""
    examples = [{"image": RED, **({"label": label} if label else {"text": "no label"})} for label in stored]
    answer = await http.post("/v1/support_sets", json={"examples": examples})
    assert answer.status_code == 200, answer.text
    body = {
        "examples": {"support_set": answer.json()["id"], **fields},
        "query": {"image": RED},
        "method": "in_context",
        "candidates": list(dict.fromkeys(filter(None, stored))),
    }
    response = await http.post("/v1/classify", json=body)
    assert response.status_code == 200, response.text
    return [shot["label"] for shot in response.json()["fewshot"]["shots"]]


async def test_each_label_is_shown_although_the_first_examples_have_one(http: httpx.AsyncClient) -> None:
    drawn = await labels(http, "aaaabbbb", k=2)
    assert sorted(drawn) == ["a", "b"]
    assert await labels(http, "aaaabbbb", k=2) == drawn


async def test_a_strategy_of_the_request_is_used(http: httpx.AsyncClient) -> None:
    assert await labels(http, "aaaabbbb", k=2, strategy="first") == ["a", "a"]


@pytest.mark.parametrize(("stored", "num_shots", "num_labels"), [("aaabbb", 4, 2), ("aabbccddee", 5, 5)])
async def test_there_are_as_many_shots_as_labels_but_at_least_four(
    http: httpx.AsyncClient, stored: str, num_shots: int, num_labels: int
) -> None:
    drawn = await labels(http, stored)
    assert (len(drawn), len(set(drawn))) == (num_shots, num_labels)


async def test_the_default_number_of_shots_has_a_limit(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompting, "MAX_DEFAULT_K", 4)
    assert len(await labels(http, "aabbccddee")) == 4


async def test_a_set_that_is_shown_whole_keeps_its_order(http: httpx.AsyncClient) -> None:
    assert await labels(http, "aabb") == ["a", "a", "b", "b"]


async def test_the_first_examples_are_shown_if_one_has_no_label(http: httpx.AsyncClient) -> None:
    assert await labels(http, ["a", "a", "b", "b", ""], k=2) == ["a", "a"]
