"""Chooses what runs in a step: running sequences first, then waiting ones, within budgets of tokens, frames, blocks, slots.

A long prompt is computed in pieces. A piece ends before the first token whose media item is not there yet, so a sequence
waits only for its own pixels. When blocks run out, the last sequence releases its blocks and waits again.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection
from dataclasses import dataclass, field

from server.engine.caches import BlockPool, Encoding, MediaCache
from server.engine.config import EngineConfig
from server.engine.sequence import Sequence


@dataclass(slots=True)
class Row:
    """One sequence's part of a step: `count` tokens from `start`. It `samples` if that reaches the sequence's end."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass(slots=True)
class Plan:
    """A step for the runner: rows, encodings and copies, and the budgets that are left."""

    tokens_left: int
    frames_left: int
    rows: list[Row] = field(default_factory=list)
    encodings: list[Encoding] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # blocks (from, to), copied before anything else
    admitted: list[Sequence] = field(default_factory=list)
    missing_media: list[bytes] = field(default_factory=list)  # sources to request

    def has_room_for(self, num_frames: int) -> bool:
        """Return whether a media item can be encoded; one with more frames than the budget is encoded alone."""
        return num_frames <= self.frames_left or not self.encodings

    def add_encoding(self, encoding: Encoding, num_frames: int) -> None:
        self.encodings.append(encoding)
        self.frames_left -= num_frames


class Scheduler:
    def __init__(
        self, config: EngineConfig, blocks: BlockPool, media: MediaCache, *, all_previous: bool = False
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.media = media
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._all_previous = all_previous
        self._copies: list[tuple[int, int]] = []

    def add(self, sequence: Sequence) -> list[bytes]:
        """Queue a sequence, and return the sources to request.

        These were never supplied or, after a cached prefix, are no longer in any cache.
        """
        self.queue(sequence)
        first = 0
        if self._resolve(sequence):
            num_cached = len(self._cached_prefix(sequence)) * self.config.block_size
            first = max(sequence.media_index[num_cached], 0)
        keys = ((source, self.media.content_keys.get(source)) for source in sequence.sources[first:])
        return self.media.request(source for source, key in keys if key is None or not self.media.is_ready(key))

    def queue(self, sequence: Sequence) -> None:
        sequence.is_waiting = True
        insort(self.waiting, sequence, key=lambda s: s.order)

    def schedule(self) -> Plan:
        max_frames = self.config.max_frames_per_step if self.running else self.config.max_frames_idle
        plan = Plan(self.config.max_tokens_per_step, max_frames, copies=self._copies)
        self._copies = []
        self._schedule_running(plan)
        self._schedule_waiting(plan)
        while not plan.rows and self._preempt_blocker():
            self._schedule_waiting(plan)
        return plan

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Let `child` continue from its parent's last token; without blocks for its tokens, return False and do nothing.

        Full blocks are shared, the last one is copied, and media get a second reference.
        """
        num_full, remainder = divmod(parent.num_computed, self.config.block_size)
        num_new = self._num_blocks_for(len(child.token_ids)) - num_full
        new_blocks = self.blocks.allocate(num_new) if parent.block_table else None
        if new_blocks is None:
            return False
        shared = parent.block_table[:num_full]
        self.blocks.share(shared)
        child.block_table = shared + new_blocks
        child.num_computed = parent.num_computed
        if remainder:
            self._copies.append((parent.block_table[num_full], new_blocks[0]))
        child.media_slots = {key: self.media.slots.acquire(key) for key in parent.media_slots}
        insort(self.running, child, key=lambda s: s.order)
        return True

    def fork_stem(self, stem: Sequence, child: Sequence) -> bool:
        """Fork within the limit of running sequences, if need be preempting requests that came after this one."""
        if not self._num_admissible():
            return False
        while not self.fork(stem, child):
            if not stem.block_table or self.running[-1].order <= stem.order:
                return False
            self._preempt(self.running[-1])
        return True

    def commit(self, plan: Plan, failed: Collection[Sequence] = ()) -> None:
        """Note that the step's keys and values are computed: publish full blocks, release media that no later token reads.

        Blocks of `failed` sequences are not published.
        """
        for row in plan.rows:
            sequence = row.sequence
            if sequence in failed:
                continue
            sequence.num_computed += row.count
            for block in range(row.start // self.config.block_size, sequence.num_computed // self.config.block_size):
                digest = sequence.block_hash(block, self.config.block_size)
                self.blocks.publish(sequence.block_table[block], digest)
            self._release_read_media(sequence)

    def finish(self, sequence: Sequence) -> None:
        """End a sequence, running or waiting, and release what it holds."""
        sequence.is_finished = True
        self._release(sequence)
        queue = self.waiting if sequence.is_waiting else self.running
        queue.remove(sequence)

    def _schedule_running(self, plan: Plan) -> None:
        for sequence in list(self.running):
            if sequence.is_waiting:  # it was preempted for one before it
                continue
            count = self._num_runnable(sequence, plan)
            if count and self._grow(sequence, sequence.num_computed + count):
                self._add_row(plan, sequence, count)

    def _schedule_waiting(self, plan: Plan) -> None:
        num_admissible = self._num_admissible()
        in_progress = self._next_blocks(self.running) if self.waiting else set()
        for sequence in list(self.waiting):
            if plan.tokens_left <= 0 or not num_admissible:
                return
            if not self._resolve(sequence) or self._first_missing_block(sequence) in in_progress:
                continue
            num_cached_media = self.media.num_cached(sequence.keys)
            if not self._reserve(sequence):
                return  # later sequences do not overtake for lack of blocks, or a long prompt would wait for ever
            if count := self._num_runnable(sequence, plan):
                num_admissible -= 1
                self._admit(plan, sequence, num_cached_media)
                self._add_row(plan, sequence, count)
                in_progress |= self._next_blocks([sequence])
            else:
                self._release(sequence)

    def _next_blocks(self, running: Collection[Sequence]) -> set[bytes]:
        """Return the hash of each sequence's next full block: others that need it wait for it instead of computing it."""
        size = self.config.block_size
        blocks = ((sequence, sequence.num_computed // size) for sequence in running)
        return {s.block_hash(block, size) for s, block in blocks if (block + 1) * size <= len(s.token_ids)}

    def _first_missing_block(self, sequence: Sequence) -> bytes | None:
        """Return the hash of a waiting sequence's first block that is not cached but could be."""
        num_cached, size = len(self._cached_prefix(sequence)), self.config.block_size
        could_be_cached = num_cached < self._first_computed(sequence) // size
        return sequence.block_hash(num_cached, size) if could_be_cached else None

    def _num_admissible(self) -> int:
        """Return how many more sequences may run; computed stems do not count, as they take no part in steps."""
        num_stems = sum(sequence.is_stem and sequence.is_computed for sequence in self.running)
        return max(self.config.max_sequences - len(self.running) + num_stems, 0)

    def _add_row(self, plan: Plan, sequence: Sequence, count: int) -> None:
        start = sequence.num_computed
        plan.rows.append(Row(sequence, start, count, samples=start + count == len(sequence.token_ids)))
        plan.tokens_left -= count

    def _admit(self, plan: Plan, sequence: Sequence, num_cached_media: int) -> None:
        self.waiting.remove(sequence)
        sequence.is_waiting = False
        insort(self.running, sequence, key=lambda s: s.order)
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.num_cached_tokens = sequence.num_computed
            sequence.num_cached_media = num_cached_media
            plan.admitted.append(sequence)

    def _resolve(self, sequence: Sequence) -> bool:
        """Return whether the content keys of all media are known: the prefix cache is keyed by them."""
        if len(sequence.keys) < len(sequence.sources):
            keys = [self.media.content_keys.get(source) for source in sequence.sources]
            sequence.keys = [key for key in keys if key is not None]
        return len(sequence.keys) == len(sequence.sources)

    def _reserve(self, sequence: Sequence) -> bool:
        """Assign blocks to a sequence for all of its tokens: shared ones for a cached prefix, new ones for the rest."""
        cached = self._cached_prefix(sequence)
        self.blocks.share(cached)
        new_blocks = self.blocks.allocate(self._num_blocks_for(len(sequence.token_ids)) - len(cached))
        if new_blocks is None:
            self.blocks.release(cached)
            return False
        sequence.block_table = cached + new_blocks
        sequence.num_computed = len(cached) * self.config.block_size
        return True

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        blocks = []
        for block in range(self._first_computed(sequence) // self.config.block_size):
            cached = self.blocks.find(sequence.block_hash(block, self.config.block_size))
            if cached is None:
                break
            blocks.append(cached)
        return blocks

    def _first_computed(self, sequence: Sequence) -> int:
        """Return the position of the first token that must be computed even if it is cached."""
        return min([len(sequence.token_ids) - 1, *sequence.scored[:1]])

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the block table to `num_tokens`, preempting the last sequences; False if this one itself was preempted."""
        num_missing = self._num_blocks_for(num_tokens) - len(sequence.block_table)
        if num_missing <= 0:
            return True
        while (new_blocks := self.blocks.allocate(num_missing)) is None:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table += new_blocks
        return True

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)

    def _preempt_blocker(self) -> bool:
        """Preempt the last running sequence if one before it waits, and return whether one was preempted.

        Beams that are done for this step, and stems, hold blocks and slots that an earlier request, or another beam, may
        otherwise lack for ever.
        """
        if not self.running or not self.waiting or self.running[-1].order < self.waiting[0].order:
            return False
        self._preempt(self.running[-1])
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        self.queue(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0
        for key in sequence.media_slots:
            self.media.slots.release(key)
        sequence.media_slots.clear()

    def _num_runnable(self, sequence: Sequence, plan: Plan) -> int:
        """Return how many tokens can run now: within the token budget, up to the first whose media are not available."""
        start, length, media_index = sequence.num_computed, len(sequence.token_ids), sequence.media_index
        end = min(length, start + plan.tokens_left)
        if start >= end:
            return 0  # without budget, or a beam that waits for the others, or a stem
        for media in range(max(media_index[start], 0), media_index[end - 1] + 1):
            if not self._hold(sequence, media, plan):
                return max(sequence.first_token_of(media), start) - start
        return end - start

    def _hold(self, sequence: Sequence, media: int, plan: Plan) -> bool:
        """Hold a slot for every page that a token with this media index reads."""
        for read in range(media + 1) if self._all_previous else (media,):
            key = sequence.keys[read]
            if key not in sequence.media_slots:
                slot = self._slot(key, sequence.sources[read], plan)
                if slot is None:
                    return False
                sequence.media_slots[key] = slot
        return True

    def _slot(self, key: bytes, source: bytes, plan: Plan) -> int | None:
        slots = self.media.slots
        if slots.find(key) is not None:
            return slots.acquire(key)
        if not self.media.is_encodable(key):
            plan.missing_media += self.media.request([source])
            return None
        num_frames = 0 if key in self.media.host else self.media.num_frames(key)
        if not slots.num_available or not plan.has_room_for(num_frames):
            return None
        encoding = self.media.begin_encoding(key)
        plan.add_encoding(encoding, num_frames)
        return encoding.slot

    def _release_read_media(self, sequence: Sequence) -> None:
        if self._all_previous:
            return
        next_token = min(sequence.num_computed, len(sequence.token_ids) - 1)
        media = max(sequence.media_index[next_token], 0)
        # only this one: media that come again later must not keep their slots from those in between
        current = sequence.keys[media] if sequence.keys else None
        for key in [key for key in sequence.media_slots if key != current]:
            self.media.slots.release(key)
            del sequence.media_slots[key]
