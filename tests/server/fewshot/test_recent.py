"""The values that were used last are kept by key, up to a number of bytes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from server.fewshot.recent import Recent

pytestmark = pytest.mark.anyio


@dataclass(frozen=True, slots=True)
class Value:
    num_bytes: int


class Builder:
    """Builds values of one size, and lists the keys that it has built."""

    def __init__(self, recent: Recent[Value], num_bytes: int = 1) -> None:
        self.built: list[str] = []
        self.num_bytes = num_bytes
        self._recent = recent

    async def get(self, key: str) -> Value:
        async def build() -> Value:
            await asyncio.sleep(0)
            self.built.append(key)
            return Value(self.num_bytes)

        return await self._recent.get(key, build)


async def test_concurrent_requests_build_once() -> None:
    builder = Builder(Recent())
    first, second = await asyncio.gather(builder.get("a"), builder.get("a"))
    assert builder.built == ["a"]
    assert first is second


async def test_the_value_that_was_used_longest_ago_is_dropped_first() -> None:
    builder = Builder(Recent(max_bytes=2))
    for key in ("a", "b", "a", "c", "a", "b", "a", "c"):
        await builder.get(key)
    assert builder.built == ["a", "b", "c", "b", "c"]


async def test_the_last_value_stays_whatever_its_size() -> None:
    builder = Builder(Recent(max_bytes=2), num_bytes=9)
    for key in ("a", "a", "b", "b", "a"):
        await builder.get(key)
    assert builder.built == ["a", "b", "a"]


async def test_after_a_failure_the_next_request_builds_again() -> None:
    recent: Recent[Value] = Recent()

    async def fail() -> Value:
        raise ValueError("unavailable")

    with pytest.raises(ValueError, match="unavailable"):
        await recent.get("a", fail)
    builder = Builder(recent)
    await builder.get("a")
    assert builder.built == ["a"]
