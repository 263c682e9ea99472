"""The memory that sequences hold: blocks for keys and values of their text, and slots for the pages of their media."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import inf

from model.config import FlamingoConfig
from server.engine.caches.blocks import BlockPool
from server.engine.caches.media import MediaCache
from server.engine.config import EngineConfig
from server.engine.plan import Plan
from server.engine.sequence import Sequence

# other sequences wait for the shots that a sequence computes within this fraction of a step's tokens; the pieces of large
# prompts have about this size
STEPS_AHEAD = 8


@dataclass(slots=True)
class Cached:
    """The blocks with which a sequence that waits can begin, in the order of computation.

    `missing` has the hashes of blocks that are not cached but could be, because another sequence computes them: the first
    one of each span.
    """

    blocks: list[int]
    num_tokens: int
    missing: list[bytes]


class Memory:
    """The blocks and slots of all sequences, and which of them wait for what others compute."""

    def __init__(self, config: EngineConfig, blocks: BlockPool, media: MediaCache, model: FlamingoConfig) -> None:
        self.config = config
        self.blocks = blocks
        self.media = media
        self._all_previous = model.gated.attends == "all_previous"
        self._alone_positions = model.language_model.alone_positions

    def missing_sources(self, sequence: Sequence) -> list[bytes]:
        """Return sources that were never supplied and, for the tokens to compute, those that are no longer in any cache."""
        first = 0
        if self.resolve(sequence):
            num_computed = self.find_cached(sequence).num_tokens if sequence.is_waiting else sequence.num_computed
            first = max(sequence.media_index[min(num_computed, len(sequence.media_index) - 1)], 0)
        keys = ((source, self.media.content_keys.get(source)) for source in sequence.sources[first:])
        return [source for source, key in keys if key is None or not self.media.is_ready(key)]

    def next_blocks(self, sequence: Sequence) -> set[bytes]:
        """Return the sequence's next full block or, while it computes shots that attend alone, the blocks of the next ones.

        Later shots are not included: a small request would wait too long for the last shots of a large one.
        """
        size, horizon = self.config.block_size, self.config.max_tokens_per_step // STEPS_AHEAD
        layout, num_computed = sequence.layout, sequence.num_computed
        if layout is not None and num_computed < layout.query_start:
            last = layout.span_of(min(num_computed + horizon, layout.query_start - 1))
            return self.blocks_of_shots(sequence, num_computed, layout.starts[last + 1])
        first_block, first_token = sequence.query_place
        block = (num_computed - first_token) // size
        is_full = first_token + (block + 1) * size <= len(sequence.token_ids)
        return {sequence.block_hash(first_block + block, size)} if is_full else set()

    def awaits(self, sequence: Sequence, in_progress: Mapping[bytes, int]) -> bool:
        """Return whether a sequence waits for blocks that another one, of no lower priority, computes."""
        missing = self.look_for_cached(sequence)
        is_in_progress = any(in_progress.get(block, inf) <= sequence.account.priority for block in missing)
        if is_in_progress and sequence.layout is not None:
            sequence.num_missing = None  # the shots are looked for again in the next step
        return is_in_progress

    def look_for_cached(self, sequence: Sequence) -> list[bytes]:
        """Update `num_missing` of a sequence that waits, and return the hashes of its first missing blocks.

        Of the blocks that were found before, only the last is looked for again, since many long prompts may wait. An
        earlier one may have been evicted, which `find_cached` notices. Shots that attend alone are all looked for.
        """
        size, num_tokens = self.config.block_size, len(sequence.token_ids)
        if sequence.layout is not None:
            cached = self.find_cached(sequence)
            sequence.num_missing = num_tokens - cached.num_tokens
            return cached.missing
        num_blocks = sequence.first_computed // size
        number = 0 if sequence.num_missing is None else (num_tokens - sequence.num_missing) // size
        if number and self.blocks.find(sequence.block_hash(number - 1, size)) is None:
            number = 0
        while number < num_blocks and self.blocks.find(sequence.block_hash(number, size)) is not None:
            number += 1
        sequence.num_missing = num_tokens - number * size
        return [sequence.block_hash(number, size)] if number < num_blocks else []

    def blocks_of_shots(self, sequence: Sequence, start: int, stop: int) -> set[bytes]:
        """Return the hashes of the blocks of shots that attend alone which a range of tokens completes."""
        layout = sequence.layout
        assert layout is not None
        parts = layout.parts(start, min(stop, layout.query_start))
        blocks = chain.from_iterable(map(layout.completed_blocks, parts))
        return {sequence.block_hash(block, self.config.block_size) for block in blocks}

    def resolve(self, sequence: Sequence) -> bool:
        """Return whether the content keys of all media are known: the prefix cache is keyed by them."""
        if len(sequence.keys) < len(sequence.sources):
            keys = [self.media.content_keys.get(source) for source in sequence.sources]
            if None in keys:
                return False
            keys_known = [key for key in keys if key is not None]
            sequence.identify(keys_known, self.config.block_size, self._alone_positions)
        return True

    def find_cached(self, sequence: Sequence) -> Cached:
        """Return the cached blocks with which a sequence that waits can begin; its cached shots become the first ones."""
        if sequence.layout is None:
            return self._find_after_shots(sequence)
        spans = sequence.spans
        assert spans is not None
        cached = self._find(spans.prefix_hashes, len(spans.prefix))
        if cached.missing:
            return cached
        matches = [self._find(shot.hashes, len(shot.token_ids)) for shot in spans.shots]
        # shots that are cached whole come first, then the others by their number of cached tokens
        order = sorted(
            range(len(matches)), key=lambda shot: -matches[shot].num_tokens if matches[shot].missing else -inf
        )
        sequence.arrange(order)
        for shot in order:
            if not cached.missing:
                cached.blocks += matches[shot].blocks
                cached.num_tokens += matches[shot].num_tokens
            cached.missing += matches[shot].missing
        if not cached.missing:
            rest = self._find_after_shots(sequence)
            return Cached(cached.blocks + rest.blocks, cached.num_tokens + rest.num_tokens, rest.missing)
        return cached

    def _find(self, hashes: Iterable[bytes], num_tokens: int) -> Cached:
        """Return the leading blocks of a span that are cached."""
        blocks: list[int] = []
        for digest in hashes:
            block = self.blocks.find(digest)
            if block is None:
                return Cached(blocks, len(blocks) * self.config.block_size, [digest])
            blocks.append(block)
        return Cached(blocks, num_tokens, [])

    def _find_after_shots(self, sequence: Sequence) -> Cached:
        """Return the cached blocks after shots that attend alone, up to the first token that must be computed."""
        size, (first_block, first_token) = self.config.block_size, sequence.query_place
        num_blocks = (sequence.first_computed - first_token) // size
        hashes = (sequence.block_hash(first_block + number, size) for number in range(num_blocks))
        return self._find(hashes, num_blocks * size)

    def skip_cached(self, sequence: Sequence) -> None:
        """Take the shots that others have computed since a sequence was admitted, instead of computing them again.

        They move before the shot that is next, or that is computed in part. Their pages are released: no token reads them.
        """
        layout, spans, size = sequence.layout, sequence.spans, self.config.block_size
        if layout is None or spans is None or sequence.num_computed >= layout.query_start:
            return
        span = layout.span_of(sequence.num_computed)
        num_done, order = sequence.num_computed - layout.starts[span], sequence.order_of_shots
        left = order[layout.num_begun(sequence.num_computed) :]
        cached = [shot for shot in left if not self._find(spans.shots[shot].hashes, 0).missing]
        if not span or not cached:
            return
        rest = [shot for shot in order[span - 1 :] if shot not in cached]
        layout = sequence.arrange([*order[: span - 1], *cached, *rest])
        for index in chain.from_iterable(map(layout.blocks, range(span, span + len(cached)))):
            block = self.blocks.find(sequence.block_hash(index, size))
            assert block is not None
            self.blocks.share([block])
            self.blocks.release([sequence.block_table[index]])
            sequence.block_table[index] = block
        sequence.num_computed = layout.starts[span + len(cached)] + num_done
        self.release_read_media(sequence)

    def shots_within(self, sequence: Sequence, start: int, stop: int) -> Iterator[bytes]:
        """Yield the hashes of the last blocks of the shots that attend alone to which a range of tokens belongs."""
        layout, spans = sequence.layout, sequence.spans
        if layout is None or spans is None:
            return
        for part in layout.parts(start, min(stop, layout.query_start)):
            if part.span:
                yield spans.shots[sequence.order_of_shots[part.span - 1]].hashes[-1]

    def shots_in_part(self, running: Iterable[Sequence]) -> dict[bytes, Sequence]:
        """Return the shots of which sequences have computed some tokens, but not all: by the hash of the last block."""
        shots: dict[bytes, Sequence] = {}
        for sequence in running:
            layout, next_token = sequence.layout, sequence.num_computed
            if layout is not None and layout.starts[layout.span_of(next_token)] < next_token:
                for digest in self.shots_within(sequence, next_token, next_token + 1):
                    shots.setdefault(digest, sequence)
        return shots

    def put_off(self, sequence: Sequence, shots: Mapping[bytes, Sequence]) -> int:
        """Move the shots that other sequences compute to the end of the order, and return where their tokens start.

        Without such shots, that is the end of the sequence. No sequence waits for one of a lower priority, and one that
        waits holds no page but that of its next token.
        """
        layout, spans, order = sequence.layout, sequence.spans, sequence.order_of_shots
        if layout is None or spans is None or not shots or sequence.num_computed >= layout.query_start:
            return len(sequence.token_ids)
        first = layout.num_begun(sequence.num_computed)
        owners = {shot: shots.get(spans.shots[shot].hashes[-1], sequence) for shot in order[first:]}
        priority = sequence.account.priority
        later = [s for s, owner in owners.items() if owner is not sequence and owner.account.priority <= priority]
        if not later:
            return len(sequence.token_ids)
        sooner = [shot for shot in order if shot not in later]
        layout = sequence.arrange([*sooner, *later])
        self.release_read_media(sequence)
        return layout.starts[1 + len(sooner)]

    def place(self, sequence: Sequence, blocks: list[int]) -> list[int]:
        """Return a block table; `blocks` are in the order of computation."""
        layout = sequence.layout
        if layout is None:
            return blocks
        indices = [index for span in range(len(layout.starts) - 1) for index in layout.blocks(span)]
        table = [0] * len(indices)
        for index, block in zip(indices, blocks, strict=False):
            table[index] = block
        return table + blocks[len(indices) :]

    def num_blocks_for(self, sequence: Sequence, num_tokens: int) -> int:
        if sequence.layout is not None:
            return sequence.layout.num_blocks(num_tokens)
        return -(-num_tokens // self.config.block_size)

    def num_full_blocks(self, sequence: Sequence) -> int:
        """Return how many leading blocks of a computed sequence's table get no more tokens."""
        if sequence.layout is not None:
            return sequence.layout.num_full_blocks(sequence.num_computed)
        return sequence.num_computed // self.config.block_size

    def publish(self, sequence: Sequence, start: int) -> None:
        """Make the blocks findable that the tokens from `start` to `num_computed` complete."""
        size, layout = self.config.block_size, sequence.layout
        completed: Iterable[int] = range(start // size, sequence.num_computed // size)
        if layout is not None:
            parts = layout.parts(start, sequence.num_computed)
            completed = chain.from_iterable(map(layout.completed_blocks, parts))
        for block in completed:
            self.blocks.publish(sequence.block_table[block], sequence.block_hash(block, size))

    def release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0
        self.release_media(sequence)

    def release_media(self, sequence: Sequence) -> None:
        for key in sequence.media_slots:
            self.media.slots.release(key)
        sequence.media_slots.clear()

    def hold(self, sequence: Sequence, media: int, plan: Plan) -> bool:
        """Hold a slot for every page that a token with this media index reads; return whether this step may read them."""
        can_be_read = True
        for read in range(media + 1) if self._all_previous else (media,):
            key = sequence.keys[read]
            if key not in sequence.media_slots:
                slot = self._slot(sequence, read, plan)
                if slot is None:
                    return False
                sequence.media_slots[key] = slot
            can_be_read = can_be_read and key not in plan.unread_pages
        return can_be_read

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
        # only this one: media that are read again later must not keep the slots that the media in between need
        current = sequence.keys[media] if sequence.keys else None
        for key in [key for key in sequence.media_slots if key != current]:
            self.media.slots.release(key)
            del sequence.media_slots[key]
