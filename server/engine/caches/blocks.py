"""Allocates blocks for the keys and values of text, and finds cached blocks by hash: the prefix cache.

A published block keeps its contents when its last owner releases it, and is reused only after all empty blocks, least
recently used first. Its hash covers token ids *and* the media that those tokens read, so two prompts share a block only if
the model would compute the same keys and values for both. The last block of a span may be published part full.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def block_hash(parent: bytes, token_ids: Sequence[int], media_keys: Sequence[bytes]) -> bytes:
    """Return the hash of a full block: of its parent's hash, its ids, and the media key that each run of tokens reads."""
    digest = hashlib.blake2b(parent, digest_size=32, person=b"flmbynce-block")
    digest.update(array("q", token_ids).tobytes())
    previous = None
    for position, key in enumerate(media_keys):
        if key != previous:
            digest.update(position.to_bytes(4, "little") + len(key).to_bytes(4, "little") + key)
            previous = key
    return digest.digest()


class BlockPool:
    """`num_blocks` blocks, each empty, cached (no owner, but contents to share) or in use by `references` owners.

    Cached blocks that are pinned are reused only if there are no others: at most half of all blocks are pinned.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._kept: OrderedDict[int, None] = OrderedDict()  # cached ones that are pinned
        self._pinned: set[bytes] = set()
        self._references = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        return len(self._free) + len(self._cached) + len(self._kept)

    @property
    def num_pinned(self) -> int:
        return len(self._pinned)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks with one reference each, or return None and take nothing."""
        if count > self.num_available:
            return None
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        block = self._free.pop() if self._free else self._evict()
        self._references[block] = 1
        return block

    def _evict(self) -> int:
        block, _ = (self._cached or self._kept).popitem(last=False)
        digest = self._hash_of.pop(block)
        del self._block_of[digest]
        self._pinned.discard(digest)
        return block

    def share(self, blocks: Sequence[int]) -> None:
        """Add an owner to each block, in use or cached."""
        for block in blocks:
            if self._references[block] == 0:
                del self._queue_of(block)[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Remove an owner from each block, the last block first, so that a prefix stays cached longer than its suffix."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0 and block in self._hash_of:
                self._queue_of(block)[block] = None
            elif self._references[block] == 0:
                self._free.append(block)

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full block findable by its hash, unless another block already is."""
        if digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def find(self, digest: bytes) -> int | None:
        return self._block_of.get(digest)

    def _queue_of(self, block: int) -> OrderedDict[int, None]:
        return self._kept if self._hash_of[block] in self._pinned else self._cached

    def pin(self, hashes: Iterable[bytes]) -> None:
        """Keep published blocks longer than all others, as long as there is room; others are ignored."""
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is not None and digest not in self._pinned and self.num_pinned < self.num_blocks // 2:
                self._pinned.add(digest)
                _move(block, self._cached, self._kept)

    def unpin(self, hashes: Iterable[bytes]) -> None:
        for digest in self._pinned.intersection(hashes):
            self._pinned.remove(digest)
            _move(self._block_of[digest], self._kept, self._cached)

    def clear_cache(self) -> None:
        """Forget every published block."""
        for queue in (self._cached, self._kept):
            self._free.extend(queue)
            queue.clear()
        self._pinned.clear()
        self._hash_of.clear()
        self._block_of.clear()


def _move(block: int, source: OrderedDict[int, None], target: OrderedDict[int, None]) -> None:
    if block in source:
        del source[block]
        target[block] = None
