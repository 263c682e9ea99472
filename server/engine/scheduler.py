"""Who runs in a step: running sequences first, then waiting ones, under budgets of tokens, frames, blocks and slots.

A long prompt is computed in pieces. A piece ends before the first token whose media is not there yet, so a sequence waits
for its pixels, not for others'. When blocks run out, the sequence that came last gives its own back and waits again.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from server.engine.block_pool import BlockPool
from server.engine.config import EngineConfig
from server.engine.media_cache import Encoding, MediaCache
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
    """Everything the runner may know of a step."""

    tokens_left: int
    frames_left: int
    rows: list[Row] = field(default_factory=list)
    encodings: list[Encoding] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # blocks (from, to), before anything else
    admitted: list[Sequence] = field(default_factory=list)
    wanted: list[bytes] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not self.rows


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
        """Queue a sequence; returns the sources that somebody must now be asked for."""
        self.queue(sequence)
        return self.media.want(self._missing_sources(sequence))

    def _missing_sources(self, sequence: Sequence) -> list[bytes]:
        """Sources never seen; and, past a cached prefix, those that were seen and are nowhere any more."""
        first = 0
        if self._resolve(sequence):
            cached = len(self._cached_prefix(sequence)) * self.config.block_size
            first = max(sequence.media_index[cached], 0)
        keys = ((source, self.media.key(source)) for source in sequence.sources[first:])
        return [source for source, key in keys if key is None or not self.media.is_ready(key)]

    def schedule(self) -> Plan:
        plan = Plan(self.config.max_tokens_per_step, self._frame_budget(), copies=self._copies)
        self._copies = []
        self._schedule_running(plan)
        self._schedule_waiting(plan)
        while plan.is_empty and self._preempt_one_that_waits_for_others():
            self._schedule_waiting(plan)
        return plan

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Let `child` go on from where `parent` is: full blocks are shared, the last one is copied, media are held twice.

        False, and nothing done, without blocks for the child's tokens.
        """
        full, begun = divmod(parent.num_computed, self.config.block_size)
        fresh = self.blocks.allocate(self._blocks_for(len(child)) - full) if parent.block_table else None
        if fresh is None:
            return False
        self.blocks.share(parent.block_table[:full])
        child.block_table = parent.block_table[:full] + fresh
        child.num_computed = parent.num_computed
        self._copies += [(parent.block_table[full], fresh[0])] if begun else []
        child.held = {key: self.media.slots.acquire(key) for key in parent.held}
        insort(self.running, child, key=lambda s: s.order)
        return True

    def fork_stem(self, stem: Sequence, child: Sequence) -> bool:
        """As `fork`, within the number of sequences, and at the expense of requests that came after this one."""
        if not self._num_seats():
            return False
        while not self.fork(stem, child):
            if not stem.block_table or self.running[-1].order <= stem.order:
                return False
            self._preempt(self.running[-1])
        return True

    def queue(self, sequence: Sequence) -> None:
        sequence.is_waiting = True
        insort(self.waiting, sequence, key=lambda s: s.order)

    def commit(self, plan: Plan, failed: Collection[Sequence] = ()) -> None:
        """The step's K/V is there: full blocks can be found, media that no later token reads are let go.

        Nobody shall find a block of a sequence that failed.
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
        """The sequence ends for good, in whatever state it is."""
        sequence.is_finished = True
        self._give_back(sequence)
        queue = self.waiting if sequence.is_waiting else self.running
        queue.remove(sequence)

    def _frame_budget(self) -> int:
        return self.config.max_frames_per_step if self.running else self.config.max_frames_idle

    def _schedule_running(self, plan: Plan) -> None:
        for sequence in list(self.running):
            if sequence.is_waiting:  # preempted for the sake of one before it
                continue
            count = self._count(sequence, plan)
            if count and self._grow(sequence, sequence.num_computed + count):
                self._plan_row(plan, sequence, count)

    def _schedule_waiting(self, plan: Plan) -> None:
        num_seats, begun = self._num_seats(), self._begun_blocks() if self.waiting else set()
        for sequence in list(self.waiting):
            if plan.tokens_left <= 0 or not num_seats:
                return
            if not self._resolve(sequence) or self._next_block(sequence) in begun:
                continue
            num_cached_media = self.media.num_cached(sequence.keys)
            if not self._reserve(sequence):
                return  # no overtaking for lack of blocks, or a long prompt would wait for ever
            if count := self._count(sequence, plan):
                num_seats -= 1
                self._admit(plan, sequence, num_cached_media)
                self._plan_row(plan, sequence, count)
                begun |= self._begun_blocks(sequence)
            else:
                self._give_back(sequence)

    def _begun_blocks(self, *sequences: Sequence) -> set[bytes]:
        """The next full block of each running sequence: who needs it too waits for it, and does not compute it as well."""
        size = self.config.block_size
        places = ((sequence, sequence.num_computed // size) for sequence in sequences or self.running)
        return {s.block_hash(block, size) for s, block in places if (block + 1) * size <= len(s)}

    def _next_block(self, sequence: Sequence) -> bytes | None:
        """The first block of a waiting sequence that is in no cache, where it could be."""
        cached, size = len(self._cached_prefix(sequence)), self.config.block_size
        could_be_cached = cached < self._first_computed(sequence) // size
        return sequence.block_hash(cached, size) if could_be_cached else None

    def _num_seats(self) -> int:
        """How many more sequences may run. A computed stem takes no part in a step, and no seat."""
        num_stems = sum(sequence.is_stem and sequence.is_computed for sequence in self.running)
        return max(self.config.max_sequences - len(self.running) + num_stems, 0)

    def _plan_row(self, plan: Plan, sequence: Sequence, count: int) -> None:
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
        """Whether every media's content key is known: the prefix cache is keyed by them."""
        if len(sequence.keys) < len(sequence.sources):
            keys = [self.media.key(source) for source in sequence.sources]
            sequence.keys = [key for key in keys if key is not None]
        return len(sequence.keys) == len(sequence.sources)

    def _reserve(self, sequence: Sequence) -> bool:
        """Blocks for all of its tokens: those of a cached prefix are shared, the others new."""
        cached = self._cached_prefix(sequence)
        self.blocks.share(cached)
        fresh = self.blocks.allocate(self._blocks_for(len(sequence)) - len(cached))
        if fresh is None:
            self.blocks.release(cached)
            return False
        sequence.block_table = cached + fresh
        sequence.num_computed = len(cached) * self.config.block_size
        return True

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        found = []
        for block in range(self._first_computed(sequence) // self.config.block_size):
            hit = self.blocks.find(sequence.block_hash(block, self.config.block_size))
            if hit is None:
                break
            found.append(hit)
        return found

    def _first_computed(self, sequence: Sequence) -> int:
        """The first token that must be computed, cached or not."""
        return min([len(sequence) - 1, *sequence.scored[:1]])

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks up to `num_tokens`, at the expense of those who came last; False if that is the sequence itself."""
        missing = self._blocks_for(num_tokens) - len(sequence.block_table)
        if missing <= 0:
            return True
        while (fresh := self.blocks.allocate(missing)) is None:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table += fresh
        return True

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)

    def _preempt_one_that_waits_for_others(self) -> bool:
        """Beams that are done for this step, and stems, hold blocks and slots that an earlier request, or one of their
        own, may lack: without this, for ever."""
        if not self.running or not self.waiting or self.running[-1].order < self.waiting[0].order:
            return False
        self._preempt(self.running[-1])
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self.running.remove(sequence)
        self._give_back(sequence)
        self.queue(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0
        for key in sequence.held:
            self.media.slots.release(key)
        sequence.held.clear()

    def _count(self, sequence: Sequence, plan: Plan) -> int:
        """How many tokens can run now: within the token budget, up to the first whose media cannot be had."""
        start = sequence.num_computed
        if start == len(sequence):
            return 0  # a beam that waits for the others, or a stem
        end = min(len(sequence), start + plan.tokens_left)
        for media in range(
            max(sequence.media_index[start], 0), sequence.media_index[end - 1] + 1 if end > start else 0
        ):
            if not self._hold(sequence, media, plan):
                end = min(end, max(sequence.first_token_of(media), start))
                break
        return end - start

    def _hold(self, sequence: Sequence, media: int, plan: Plan) -> bool:
        """Hold a slot for every page that a token of this media reads."""
        for read in range(media + 1) if self._all_previous else (media,):
            key = sequence.keys[read]
            if key not in sequence.held:
                slot = self._slot(key, sequence.sources[read], plan)
                if slot is None:
                    return False
                sequence.held[key] = slot
        return True

    def _slot(self, key: bytes, source: bytes, plan: Plan) -> int | None:
        slots = self.media.slots
        if slots.find(key) is not None:
            return slots.acquire(key)
        if not self.media.is_encodable(key):
            plan.wanted += self.media.want([source])
            return None
        cost = self.media.num_frames(key)
        # a media of more frames than the budget goes alone
        over_budget = cost > plan.frames_left and bool(plan.encodings)
        if over_budget or not slots.num_available:
            return None
        plan.frames_left -= cost
        encoding = self.media.begin_encoding(key)
        plan.encodings.append(encoding)
        return encoding.slot

    def _release_read_media(self, sequence: Sequence) -> None:
        if self._all_previous:
            return
        next_token = min(sequence.num_computed, len(sequence) - 1)
        still_read = max(sequence.media_index[next_token], 0)
        # just this one: a media that comes again later must not keep its slot from the ones in between
        current = sequence.keys[still_read] if sequence.keys else None
        for key in [key for key in sequence.held if key != current]:
            self.media.slots.release(key)
            del sequence.held[key]

    def sequences(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting
