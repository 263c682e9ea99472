"""The block pool conforms to its invariants.

Each block has the owners that hold it, all blocks are released, and the cache finds exactly the published blocks.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.caches.blocks import BlockPool, block_hash


def assert_is_whole(pool: BlockPool, held: list[list[int]]) -> None:
    owners = {block: sum(blocks.count(block) for blocks in held) for block in range(pool.num_blocks)}
    assert pool._references == [owners[b] for b in range(pool.num_blocks)]
    assert pool.num_available == sum(count == 0 for count in owners.values())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_sequence_of_calls(data: st.DataObject) -> None:
    pool = BlockPool(6)
    held: list[list[int]] = []
    published: dict[bytes, int] = {}
    for step in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["allocate", "release", "publish", "share", "pin", "unpin", "clear"]))
        if action == "allocate":
            count = data.draw(st.integers(0, 7))
            available = pool.num_available
            blocks = pool.allocate(count)
            assert (blocks is None) == (count > available)
            if blocks is not None:
                assert len(set(blocks)) == count
                held.append(blocks)
                published = {d: b for d, b in published.items() if b not in blocks}
        elif action == "release" and held:
            pool.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        elif action == "publish" and any(held):
            block = data.draw(st.sampled_from([b for blocks in held for b in blocks]))
            digest = bytes([step])
            if block not in published.values():
                published[digest] = block
            pool.publish(block, digest)
        elif action == "share" and published:
            block = published[data.draw(st.sampled_from(sorted(published)))]
            pool.share([block])
            held.append([block])
        elif action in ("pin", "unpin") and published:
            hashes = data.draw(st.sets(st.sampled_from(sorted(published))))
            (pool.pin if action == "pin" else pool.unpin)(hashes)
        elif action == "clear":
            pool.clear_cache()
            published.clear()
        assert_is_whole(pool, held)
        assert pool.num_pinned <= 3
        assert {digest: pool.find(digest) for digest in published} == published
    for blocks in held:
        pool.release(blocks)
    assert pool.num_available == 6


def test_the_least_recently_used_block_is_evicted_first_and_a_prefix_last() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    assert blocks is not None
    for i, block in enumerate(blocks):
        pool.publish(block, bytes([i]))
    pool.release(blocks)
    pool.allocate(1)
    assert [pool.find(bytes([i])) is None for i in range(3)] == [False, False, True]


def test_pinned_blocks_are_evicted_after_all_others_and_are_at_most_half_of_all() -> None:
    pool = BlockPool(6)
    blocks = pool.allocate(6)
    assert blocks is not None
    hashes = [bytes([i]) for i in range(6)]
    for block, digest in zip(blocks, hashes, strict=True):
        pool.publish(block, digest)
    pool.pin(hashes[2:4])
    pool.release(blocks)
    pool.pin([*hashes[3:], b"unknown"])
    assert pool.num_pinned == 3  # there is no room for the last one
    pool.unpin([hashes[2], b"unknown"])
    kept = pool.allocate(4)
    assert [pool.find(digest) is None for digest in hashes] == [True, True, True, False, False, True]
    assert kept is not None
    assert pool.allocate(2) is not None
    assert pool.num_pinned == 0


def test_the_first_block_published_for_a_hash_is_found() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    assert blocks is not None
    for block in blocks:
        pool.publish(block, b"same")
    assert pool.find(b"same") == blocks[0]


@pytest.mark.parametrize(
    ("ids", "keys"),
    [
        ([1, 2, 4], [b"", b"a", b"a"]),
        ([1, 2, 3], [b"", b"", b"a"]),
        ([1, 2, 3], [b"", b"b", b"b"]),
        ([1, 2, 3], [b"a", b"a", b"a"]),
        ([1, 2, 3], [b"", b"a", b"b"]),
    ],
)
def test_a_hash_covers_ids_and_the_media_that_they_read(ids: list[int], keys: list[bytes]) -> None:
    base = block_hash(b"", [1, 2, 3], [b"", b"a", b"a"])
    assert block_hash(b"", [1, 2, 3], [b"", b"a", b"a"]) == base
    assert block_hash(b"", ids, keys) != base
    assert block_hash(base, [1, 2, 3], [b"", b"a", b"a"]) != base
