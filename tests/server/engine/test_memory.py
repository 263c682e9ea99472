"""The memory of sequences: a prompt begins with the blocks that are cached, up to the first that is missing."""

from __future__ import annotations

from server.engine.caches import BlockPool, MediaCache
from server.engine.memory import Memory
from server.engine.sequence import Order, Sequence
from tests.engine_client import CONFIG, GREEDY, Prompt


def test_a_cached_prefix_ends_before_the_first_block_that_is_missing() -> None:
    blocks = BlockPool(4)
    memory = Memory(CONFIG, blocks, MediaCache(1, 0, b""), all_previous=False)
    sequence = Sequence("a", Prompt(((-1, 4 * CONFIG.block_size),)).request("a").prompt, GREEDY, Order())
    taken = blocks.allocate(3)
    assert taken is not None
    for number in (0, 2):
        blocks.publish(taken[number], sequence.block_hash(number, CONFIG.block_size))
    assert memory.cached_prefix(sequence) == taken[:1]
    blocks.publish(taken[1], sequence.block_hash(1, CONFIG.block_size))
    assert memory.cached_prefix(sequence) == taken
