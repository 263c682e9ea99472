"""Tests that a set with as many examples as a set may have is updated from its source, with a fake server."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from flamboyance_client import AsyncClient, BadRequest, Client, SupportSet, uploads
from tests.clients.python.test_frames import Frame


@dataclass
class LimitedSet:
    """A server of one set, which refuses more than `limit` examples, and records how many each version has.

    A request with more than `max_pictures` has too many pixels.
    """

    limit: int
    max_pictures: int = 64
    ids: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    refusals: int = 0

    def reply(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET" and request.url.path.endswith("/examples"):
            data = [{"id": example_id, "label": "a"} for example_id in self.ids]
            return httpx.Response(200, json={"object": "list", "data": data, "has_more": False})
        if request.method == "POST":
            body = json.loads(request.content)
            added = [example["id"] for example in body["examples"]]
            if len(added) > self.max_pictures:
                return httpx.Response(400, json={"error": {"message": "too many", "code": "too_many_pixels"}})
            if body.get("expected_version", self.version) != self.version:
                return self.conflict()
            if len(self.ids) + len(added) > self.limit:
                self.refusals += 1
                return httpx.Response(400, json={"error": {"message": "full", "code": "too_many_examples"}})
            self.ids += added
            self.sizes.append(len(self.ids))
        if request.method == "DELETE":
            if int(request.url.params.get("expected_version", self.version)) != self.version:
                return self.conflict()
            gone = request.url.params["id"].split(",")
            self.ids = [example_id for example_id in self.ids if example_id not in gone]
            self.sizes.append(len(self.ids))
        fields: dict[str, Any] = {"version": self.version, "num_examples": len(self.ids)}
        return httpx.Response(200, json={"id": "ss_1", "name": "pets", "status": "ready", **fields})

    @property
    def version(self) -> int:
        return 1 + len(self.sizes)

    def conflict(self) -> httpx.Response:
        return httpx.Response(409, json={"error": {"message": "another version", "code": "version_conflict"}})


def upload(server: LimitedSet, names: str, *, is_async: bool = False) -> SupportSet:
    """Update the set from a data frame, with an example for each letter."""
    frame = Frame(image=[f"https://host/{name}.png" for name in names], label=["a"] * len(names))
    transport = httpx.MockTransport(server.reply)

    async def run() -> SupportSet:
        async with AsyncClient("http://server", transport=transport) as client:
            return await client.support_sets.from_dataframe(frame, name="pets")

    if is_async:
        return asyncio.run(run())
    with Client("http://server", transport=transport) as client:
        return client.support_sets.from_dataframe(frame, name="pets")


@pytest.mark.parametrize("is_async", [False, True], ids=["blocking", "async"])
def test_a_full_set_loses_only_the_examples_that_make_room(is_async: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "BATCH_EXAMPLES", 2)
    upload(server := LimitedSet(limit=8), "abcdefgh")
    server.sizes.clear()
    assert upload(server, "abcuvwxy", is_async=is_async).num_examples == 8
    assert (server.sizes, server.refusals) == ([6, 8, 6, 8, 7, 8], 1)
    assert upload(server, "abcuvwxy").version == 7


def test_a_set_with_room_gets_new_examples_before_it_loses_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "REMOVED_AT_ONCE", 2)
    upload(server := LimitedSet(limit=8), "abcd")
    server.sizes.clear()
    upload(server, "axyz")
    assert (server.sizes, server.refusals) == ([7, 5, 4], 0)


@pytest.mark.parametrize("is_async", [False, True], ids=["blocking", "async"])
def test_a_set_becomes_full_within_a_batch_that_has_too_many_pixels(is_async: bool) -> None:
    """The first half of the batch is stored then, so the set has another version."""
    upload(server := LimitedSet(limit=8), "abcdef")
    server.max_pictures = 2
    assert upload(server, "abuvwxyz", is_async=is_async).num_examples == 8
    assert max(server.sizes) == 8
    assert upload(server, "abuvwxyz").version == server.version


@pytest.mark.parametrize("batch", [1, 2, 3, 64])
def test_a_set_without_room_for_the_new_examples_loses_none(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "BATCH_EXAMPLES", batch)
    upload(server := LimitedSet(limit=8), "abcdefgh")
    before = set(server.ids)
    with pytest.raises(BadRequest, match="full"):
        upload(server, "abcdefuvw")
    assert before <= set(server.ids)


@pytest.mark.parametrize("batch", [1, 2, 3, 64])
def test_a_set_is_filled_to_its_limit(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "BATCH_EXAMPLES", batch)
    upload(server := LimitedSet(limit=8), "abcdefg")
    assert upload(server, "abcduvwx").num_examples == 8
    assert max(server.sizes) == 8


def test_more_examples_than_a_set_may_have_are_refused() -> None:
    upload(server := LimitedSet(limit=3), "abc")
    with pytest.raises(BadRequest, match="full"):
        upload(server, "abcd")
    assert (len(server.ids), server.refusals) == (3, 1)
