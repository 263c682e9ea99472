"""The spans of a prompt whose shots attend alone: what identifies each, and where their tokens lie in the block table.

A shot's keys and values depend only on the prefix, its own tokens and the media that they read. So does the chain of hashes
of its blocks, which begins with the prefix's. The last block of a span may be partly filled. If positions restart, all
shots have the same positions and their order has no effect: the block table sorts them by hash, so that a set of shots
gives the same sums in any order, and the blocks of the query are found in the cache. If the query sees the shots in a row,
they keep their order. Shots are computed in another order: the cached ones come first.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

from model.config import AlonePositions
from model.prompt import EncodedPrompt
from server.engine.caches.blocks import block_hash


@dataclass(frozen=True, slots=True)
class ShotSpan:
    """A shot's tokens, the media item that they read, and the hashes of its blocks."""

    token_ids: list[int]
    source: bytes
    key: bytes
    hashes: list[bytes]


@dataclass(frozen=True, slots=True)
class PromptSpans:
    """The prefix of a prompt, and its shots, in the order of the block table."""

    prefix: list[int]
    prefix_hashes: list[bytes]
    shots: list[ShotSpan]
    salt: bytes
    block_size: int
    alone_positions: AlonePositions

    @classmethod
    def of(
        cls, prompt: EncodedPrompt, keys: Sequence[bytes], block_size: int, alone_positions: AlonePositions
    ) -> PromptSpans:
        """Return the spans of a prompt; `keys` are the content keys of its media. Hashes form a chain from the salt on."""
        starts = prompt.span_starts
        token_ids = [prompt.token_ids[first:end] for first, end in pairwise(starts)]
        prefix_hashes = _chain(prompt.salt, token_ids[0], b"", block_size)
        parent = prefix_hashes[-1] if prefix_hashes else prompt.salt
        shots = [
            ShotSpan(ids, source, key, _chain(parent, ids, key, block_size))
            for ids, source, key in zip(token_ids[1:], prompt.media, keys, strict=False)
        ]
        if alone_positions == "restart":
            shots.sort(key=lambda shot: shot.hashes[-1])
        return cls(token_ids[0], prefix_hashes, shots, prompt.salt, block_size, alone_positions)

    @property
    def hashes(self) -> list[bytes]:
        """The hashes of all blocks before the query's, in the order of the block table."""
        return [*self.prefix_hashes, *chain.from_iterable(shot.hashes for shot in self.shots)]

    @property
    def query_parent(self) -> bytes:
        """The parent of the query's first block: a hash of the prefix and all shots, in the order of the block table."""
        digest = hashlib.blake2b(self.salt, digest_size=32, person=b"flmbynce-shots")
        for hashes in (self.prefix_hashes, *(shot.hashes for shot in self.shots)):
            digest.update(b"".join(hashes[-1:]))
        return digest.digest()


def _chain(parent: bytes, token_ids: list[int], key: bytes, block_size: int) -> list[bytes]:
    """Return the hashes of a span's blocks, of which the last may be part full."""
    hashes: list[bytes] = []
    for start in range(0, len(token_ids), block_size):
        ids = token_ids[start : start + block_size]
        parent = block_hash(parent, ids, [key] * len(ids))
        hashes.append(parent)
    return hashes


class Part(NamedTuple):
    """Consecutive tokens of one span: the span's number, and the first token and the end in the sequence."""

    span: int
    start: int
    stop: int


class Layout:
    """The places of a sequence's tokens: of its prefix, its shots in the order `computed`, and its query.

    Per span, in the order of computation, the prefix first and the query last: `starts` has the first token, `positions`
    its position, and `first_blocks` the place of its first block in the block table. The query may see shots after their
    positions: `block_offsets` has by how much.
    """

    def __init__(self, spans: PromptSpans, computed: Sequence[int]) -> None:
        block_size = self.block_size = spans.block_size
        lengths = [len(spans.prefix), *(len(spans.shots[shot].token_ids) for shot in computed)]
        num_blocks = [len(shot.hashes) for shot in spans.shots]
        blocks_of_prefix = len(spans.prefix_hashes)
        first_blocks = list(accumulate(num_blocks, initial=blocks_of_prefix))  # in the order of the block table
        self.num_prefix_blocks = blocks_of_prefix
        self.starts = list(accumulate(lengths, initial=0))
        self.first_blocks = [0, *(first_blocks[shot] for shot in computed), first_blocks[-1]]
        first, is_row = lengths[0], spans.alone_positions == "in_a_row"
        after = first + (sum(lengths[1:]) if is_row else max(lengths[1:]))
        self.positions = [0, *(first for _ in computed), after]
        # of all blocks before the query's, in the order of the block table, as the query sees them
        self.block_positions = [*_steps(0, first, block_size)]
        self.block_lengths = [*_fills(first, block_size)]
        self.block_offsets = [0] * blocks_of_prefix
        offset = 0
        for shot in spans.shots:
            num_tokens = len(shot.token_ids)
            self.block_positions += _steps(first + offset, num_tokens, block_size)
            self.block_lengths += _fills(num_tokens, block_size)
            self.block_offsets += [offset] * len(shot.hashes)
            offset += num_tokens if is_row else 0

    @property
    def query_start(self) -> int:
        return self.starts[-1]

    @property
    def first_query_block(self) -> int:
        return self.first_blocks[-1]

    def span_of(self, token: int) -> int:
        """Return the number of the span of a token, in the order of computation."""
        return bisect_right(self.starts, token) - 1

    def num_begun(self, num_tokens: int) -> int:
        """Return how many shots have tokens among the first `num_tokens`."""
        return max(bisect_left(self.starts, num_tokens) - 1, 0)

    def num_blocks(self, num_tokens: int) -> int:
        """Return the blocks for the prefix, all shots and the query's part of the first `num_tokens` tokens."""
        return self.first_query_block + max(-(-(num_tokens - self.query_start) // self.block_size), 0)

    def num_full_blocks(self, num_tokens: int) -> int:
        """Return the blocks that the first `num_tokens` tokens fill for good, given that some are the query's."""
        return self.first_query_block + (num_tokens - self.query_start) // self.block_size

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """Cut a range of tokens at the borders of spans."""
        while start < stop:
            span = self.span_of(start)
            end = stop if span == len(self.starts) - 1 else min(stop, self.starts[span + 1])
            yield Part(span, start, end)
            start = end

    def completed_blocks(self, part: Part) -> range:
        """Return the places in the block table of the blocks that a part, computed to its end, completes."""
        span, first = part.span, self.starts[part.span]
        num_complete = (part.stop - first) // self.block_size
        if span < len(self.starts) - 1 and part.stop == self.starts[span + 1]:
            num_complete = -(-(part.stop - first) // self.block_size)
        return range(
            self.first_blocks[span] + (part.start - first) // self.block_size, self.first_blocks[span] + num_complete
        )

    def blocks(self, span: int) -> range:
        """Return the places in the block table of the blocks of the prefix or a shot."""
        num_tokens = self.starts[span + 1] - self.starts[span]
        return range(self.first_blocks[span], self.first_blocks[span] - (-num_tokens // self.block_size))


def _steps(position: int, num_tokens: int, block_size: int) -> range:
    return range(position, position + num_tokens, block_size)


def _fills(num_tokens: int, block_size: int) -> list[int]:
    return [min(block_size, num_tokens - start) for start in range(0, num_tokens, block_size)]
