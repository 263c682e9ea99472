"""Pages of examples and of support sets end before their limit if their texts are long."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from server.api import set_cards
from server.api.routes import support_sets
from tests.server.api.routes.test_support_sets import SETS, create, example
from tests.server.conftest import data_url, png

pytestmark = pytest.mark.anyio


async def test_a_page_of_long_examples_ends_before_its_limit(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts of 1,000 examples may have 1.2 GB in JSON."""
    monkeypatch.setattr(support_sets, "MAX_PAGE_CHARACTERS", 100)
    lengths = [40, 60, 101, 100, 1]
    await create(http, examples=[example(f"e{i}", text="a" * length) for i, length in enumerate(lengths)])
    pages: list[dict[str, Any]] = []
    after = ""
    while not pages or pages[-1]["has_more"]:
        pages.append((await http.get(f"{SETS}/s/examples", params={"limit": 5, **after_entry(after)})).json())
        after = pages[-1]["last_id"]
    assert [[len(each["text"]) for each in page["data"]] for page in pages] == [[40, 60], [101], [100], [1]]


async def test_a_page_of_examples_with_much_metadata_ends_before_its_limit(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metadata of 1,000 examples may have 16 MB and 8 million values."""
    monkeypatch.setattr(support_sets, "MAX_PAGE_CHARACTERS", 100)
    await create(http, examples=[example(f"e{i}", text="a", metadata={"b": [1] * 14}) for i in range(5)])
    page = (await http.get(f"{SETS}/s/examples", params={"limit": 5})).json()
    assert [each["id"] for each in page["data"]] == ["e0", "e1"]
    assert page["has_more"]


async def test_a_search_of_long_examples_ends_before_its_limit(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts of 1,024 examples may have 343 MB in JSON, which stopped the event loop for seconds."""
    monkeypatch.setattr(support_sets, "MAX_PAGE_CHARACTERS", 100)
    image = data_url(png("red"))
    await create(http, examples=[example(f"e{i}", image=image, text="a" * 45) for i in range(4)])
    for k, expected in ((4, (2, 2)), (2, (2, 0)), (1, (1, 0))):
        body = {"query": {"image": image}, "k": k}
        page = (await http.post(f"{SETS}/s/search", json=body)).json()
        assert (len(page["data"]), page["examples_left_out"]) == expected


async def test_metadata_count_without_white_space(http: httpx.AsyncClient) -> None:
    """A client may send them with or without it."""
    values = [1] * 8187
    assert len(json.dumps({"a": values}, separators=(",", ":"))) == 16_381
    await create(http, metadata={"a": values})
    refused = await http.post(SETS, json={"metadata": {"a": [*values, 1, 1]}})
    assert refused.json()["error"]["message"].startswith("metadata: 16385 bytes of metadata, the limit is 16384")


async def test_a_deletion_with_a_body_is_refused(http: httpx.AsyncClient) -> None:
    """Its fields would have no effect, and what they were to prevent would be deleted."""
    await create(http, examples=[example("a")])
    for path in (f"{SETS}/s", f"{SETS}/s/examples/a", f"{SETS}/s/examples?id=a"):
        refused = await http.request("DELETE", path, json={"expected_version": 99})
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].startswith("a DELETE request may not have a body")
    assert (await http.get(f"{SETS}/s")).json()["version"] == 1


async def test_a_page_of_sets_with_long_labels_ends_before_its_limit(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The labels of one set may have 655 MB, and a page lists 1,000 sets."""
    monkeypatch.setattr(support_sets, "MAX_PAGE_CHARACTERS", 100)
    lengths = [40, 60, 101, 100, 1]
    for length in lengths:
        await create(http, name=f"s{length}", examples=[example("e", label="a" * length)])
    pages: list[dict[str, Any]] = []
    after = ""
    while not pages or pages[-1]["has_more"]:
        pages.append((await http.get(SETS, params={"limit": 5, **after_entry(after)})).json())
        after = pages[-1]["last_id"]
    assert [[each["name"] for each in page["data"]] for page in pages] == [["s40", "s60"], ["s101"], ["s100"], ["s1"]]


def after_entry(last_id: str) -> dict[str, str]:
    return {"after": last_id} if last_id else {}


async def test_long_labels_of_a_set_are_written_in_slices(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To write 60 MB at once takes the event loop a tenth of a second."""
    monkeypatch.setattr(set_cards, "MAX_PAGE_CHARACTERS", 100)
    monkeypatch.setattr(set_cards, "SLICE", 30)
    labels = [letter * 25 for letter in "abcde"]
    created = await create(
        http, examples=[example(f"e{i}", label=label) for i, label in enumerate([*labels, "a" * 25])]
    )
    card = (await http.get(f"{SETS}/s")).json()
    assert card["label_counts"] == dict.fromkeys(labels, 1) | {"a" * 25: 2}
    assert [*card["label_counts"]] == labels
    assert len(created["example_ids"]) == 6
    assert {**card, "example_ids": created["example_ids"]} == created
    pieces = [*set_cards._slices(card["label_counts"])]
    assert [piece.count(b":") for piece in pieces] == [2, 2, 1]
    monkeypatch.setattr(support_sets, "MAX_PAGE_CHARACTERS", 100)
    await create(http, name="other")
    page = (await http.get(SETS)).json()
    assert page == {"object": "list", "data": [card], "first_id": card["id"], "last_id": card["id"], "has_more": True}
