"""The memory that sequences hold: blocks for keys and values of their text, and slots for the pages of their media."""

from __future__ import annotations

from collections.abc import Collection

from server.engine.caches import BlockPool, MediaCache
from server.engine.config import EngineConfig
from server.engine.plan import Plan
from server.engine.sequence import Sequence


class Memory:
    def __init__(self, config: EngineConfig, blocks: BlockPool, media: MediaCache, *, all_previous: bool) -> None:
        self.config = config
        self.blocks = blocks
        self.media = media
        self._all_previous = all_previous

    def missing_sources(self, sequence: Sequence) -> list[bytes]:
        """Return sources that were never supplied and, after a cached prefix, those that are no longer in any cache."""
        first = 0
        if self.resolve(sequence):
            num_cached = len(self.cached_prefix(sequence)) * self.config.block_size
            first = max(sequence.media_index[num_cached], 0)
        keys = ((source, self.media.content_keys.get(source)) for source in sequence.sources[first:])
        return [source for source, key in keys if key is None or not self.media.is_ready(key)]

    def next_blocks(self, running: Collection[Sequence]) -> set[bytes]:
        """Return the hash of each sequence's next full block: others that need it wait for it instead of computing it."""
        size = self.config.block_size
        blocks = ((sequence, sequence.num_computed // size) for sequence in running)
        return {s.block_hash(block, size) for s, block in blocks if (block + 1) * size <= len(s.token_ids)}

    def first_missing_block(self, sequence: Sequence) -> bytes | None:
        """Return the hash of a waiting sequence's first block that is not cached but could be."""
        num_cached, size = len(self.cached_prefix(sequence)), self.config.block_size
        could_be_cached = num_cached < sequence.first_computed // size
        return sequence.block_hash(num_cached, size) if could_be_cached else None

    def resolve(self, sequence: Sequence) -> bool:
        """Return whether the content keys of all media are known: the prefix cache is keyed by them."""
        if len(sequence.keys) < len(sequence.sources):
            keys = [self.media.content_keys.get(source) for source in sequence.sources]
            sequence.keys = [key for key in keys if key is not None]
        return len(sequence.keys) == len(sequence.sources)

    def cached_prefix(self, sequence: Sequence) -> list[int]:
        blocks = []
        for block in range(sequence.first_computed // self.config.block_size):
            cached = self.blocks.find(sequence.block_hash(block, self.config.block_size))
            if cached is None:
                break
            blocks.append(cached)
        return blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)

    def release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0
        for key in sequence.media_slots:
            self.media.slots.release(key)
        sequence.media_slots.clear()

    def hold(self, sequence: Sequence, media: int, plan: Plan) -> bool:
        """Hold a slot for every page that a token with this media index reads."""
        for read in range(media + 1) if self._all_previous else (media,):
            key = sequence.keys[read]
            if key not in sequence.media_slots:
                slot = self._slot(sequence, read, plan)
                if slot is None:
                    return False
                sequence.media_slots[key] = slot
        return True

    def _slot(self, sequence: Sequence, media: int, plan: Plan) -> int | None:
        key, slots = sequence.keys[media], self.media.slots
        if slots.find(key) is not None:
            return slots.acquire(key)
        if not self.media.is_encodable(key):
            plan.missing_media += self.media.request([sequence.sources[media]])
            return None
        piece = self.media.encode(key, plan.frames_left, is_last_resort=plan.is_last_resort)
        if piece is None:
            return None
        plan.add_piece(piece, sequence.request_id)
        return piece.encoding.slot if piece.is_last else None

    def release_read_media(self, sequence: Sequence) -> None:
        if self._all_previous:
            return
        next_token = min(sequence.num_computed, len(sequence.token_ids) - 1)
        media = max(sequence.media_index[next_token], 0)
        # only this one: media that come again later must not keep their slots from those in between
        current = sequence.keys[media] if sequence.keys else None
        for key in [key for key in sequence.media_slots if key != current]:
            self.media.slots.release(key)
            del sequence.media_slots[key]
