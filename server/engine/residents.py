"""The running and the waiting sequences, and their seats and blocks: which sequences get them, and which release them.

When blocks run out, the last sequence releases its blocks and waits again. Seats are taken from a request that has several
for one that has none, and from large requests for a small one. The beams of a search share one seat.
"""

from __future__ import annotations

from bisect import insort
from itertools import chain
from math import inf

from model.config import FlamingoConfig
from server.engine.caches.blocks import BlockPool
from server.engine.caches.media import MediaCache
from server.engine.caches.memory import Memory
from server.engine.config import EngineConfig
from server.engine.pace import SHARE_BESIDE
from server.engine.plan import Plan
from server.engine.sequence import Sequence
from server.engine.shares import Shares

# the work done for other requests after which a sequence that lacks blocks may preempt later requests
PATIENCE = 2048
# the longest time for which heavy sequences keep the only seat while light ones wait, and the most that they can owe
MAX_SEAT_CREDIT = 0.25


class Residents:
    """The sequences of all requests, and what they hold."""

    def __init__(self, config: EngineConfig, blocks: BlockPool, media: MediaCache, model: FlamingoConfig) -> None:
        self.config = config
        self.blocks = blocks
        self.media = media
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        # a client that was idle comes first until it has received the work of a light request
        self.shares = Shares(credit=2 * config.max_light_tokens)
        self.memory = Memory(config, blocks, media, model)
        # of a prompt whose tokens read all its media together; a quarter of the slots may be pinned
        self.max_media = config.num_media_slots - config.num_media_slots // 4 if model.gated.attends != "last" else inf
        # blocks to copy in the next step: target -> source; a target may have been released and taken again since
        self.copies: dict[int, int] = {}
        self.starved: Sequence | None = None  # the oldest sequence that lacks blocks
        self._starved_at = 0.0  # the total work at the time when it began to lack blocks
        self._num_kept_blocks = config.num_blocks // 16  # blocks that heavy sequences leave to light ones
        self._seat_credit = 0.0  # seconds for which heavy sequences may have the only seat while light ones wait

    def add(self, sequence: Sequence) -> list[bytes]:
        """Queue a sequence; return the sources to request."""
        self.queue(sequence)
        return self.media.request(self.memory.missing_sources(sequence), is_first=True)

    def lacks_media(self, request_id: str, source: bytes) -> bool:
        """Return whether a sequence of a request has still to read a media item that is in no cache."""
        sequences = (s for s in chain(self.waiting, self.running) if s.request_id == request_id)
        return any(source in self.memory.missing_sources(sequence) for sequence in sequences)

    def queue(self, sequence: Sequence) -> None:
        """Open an account for a new sequence, and queue it."""
        order, is_search = sequence.order, sequence.sampling.beam_width > 0
        sequence.account = self.shares.open(sequence.request_id, order.client, order.priority, is_search=is_search)
        self._wait(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Let `child` continue from its parent's last token; without blocks for its tokens, return False and do nothing.

        Full blocks are shared, the last one is copied, and media get a second reference.
        """
        num_full = self.memory.num_full_blocks(parent)
        num_new = self.memory.num_blocks_for(child, len(child.token_ids)) - num_full
        child.account, child.num_computed = parent.account, parent.num_computed
        new_blocks = self._allocate(child, num_new) if parent.block_table else None
        if new_blocks is None:
            child.num_computed = 0
            return False
        child.account.num_sequences += 1
        shared = parent.block_table[:num_full]
        self.blocks.share(shared)
        child.block_table = shared + new_blocks
        if num_full < self.memory.num_blocks_for(parent, parent.num_computed):
            self.copies[new_blocks[0]] = parent.block_table[num_full]
        child.media_slots = {key: self.media.slots.acquire(key) for key in parent.media_slots}
        self.begin_running(child)
        return True

    def fork_stem(self, stem: Sequence, child: Sequence) -> bool:
        """Fork within the limit of running sequences, and within the request's share of them while others wait.

        If there are no blocks, and no other candidate is left, it waits for blocks as other sequences do.
        """
        if not self.num_free_seats or self._has_its_share(stem):
            return False
        if not self.fork(stem, child):
            if stem.account.num_sequences > 1:
                return False
            self.queue(child)
        return True

    def finish(self, sequence: Sequence) -> None:
        """End a sequence, running or waiting, and release what it holds."""
        sequence.is_finished = True
        if sequence.is_waiting:
            self.waiting.remove(sequence)
        else:
            self._end_running(sequence)
        self.memory.release(sequence)
        self.shares.close(sequence.request_id)

    def _wait(self, sequence: Sequence) -> None:
        sequence.is_waiting = True
        sequence.num_missing = None
        insort(self.waiting, sequence, key=lambda s: s.order)

    def begin_running(self, sequence: Sequence) -> None:
        sequence.account.note_running(1)
        insort(self.running, sequence, key=lambda s: s.order)

    def leave_seat(self, stem: Sequence) -> None:
        """Note that a stem is computed. It has no seat any more, and its first candidate needs one like a new request.

        It keeps its blocks, but no slots: a candidate that was preempted may need them for the media before the last.
        """
        stem.account.note_running(-1)
        self.memory.release_media(stem)

    def _end_running(self, sequence: Sequence) -> None:
        if not (sequence.is_stem and sequence.is_computed):
            sequence.account.note_running(-1)
        self.running.remove(sequence)

    def is_light(self, sequence: Sequence) -> bool:
        account = sequence.account
        return not account.is_large and account.need(sequence.num_left) <= self.config.max_light_tokens

    @property
    def num_free_seats(self) -> int:
        return max(self.config.max_sequences - self.shares.num_seats, 0)

    def reserve(self, plan: Plan, sequence: Sequence) -> bool:
        """Assign blocks to a sequence for all of its tokens: shared ones for what is cached, new ones for the rest."""
        cached = self.memory.find_cached(sequence)
        self.blocks.share(cached.blocks)
        num_new = self.memory.num_blocks_for(sequence, len(sequence.token_ids)) - len(cached.blocks)
        new_blocks = self._allocate(sequence, num_new, is_last_resort=plan.is_last_resort)
        if new_blocks is None:
            self.blocks.release(cached.blocks)
            self._note_starved(sequence)
            return False
        sequence.block_table = self.memory.place(sequence, cached.blocks + new_blocks)
        sequence.num_computed = cached.num_tokens
        return True

    def _allocate(self, sequence: Sequence, count: int, *, is_last_resort: bool = False) -> list[int] | None:
        """Take blocks. Heavy sequences leave some to light ones, but the oldest one may take all, so that it can end."""
        num_kept = self._num_kept_blocks
        if is_last_resort or self._is_oldest(sequence) or self.is_light(sequence):
            num_kept = 0
        if self.blocks.num_available - count < num_kept:
            return None
        if sequence is self.starved:
            self.starved = None
        return self.blocks.allocate(count)

    def _is_oldest(self, sequence: Sequence) -> bool:
        if not self.running or sequence is self.running[0]:
            return True
        return sequence.order <= self.running[0].order and sequence.account.num_running <= 1

    def grow(self, plan: Plan, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the block table to `num_tokens`, preempting the last sequences; False if this one cannot run."""
        while not self.extend(sequence, num_tokens, is_last_resort=plan.is_last_resort):
            victim = self._last_idle(plan, sequence)
            if victim is sequence and self.running[-1] is not sequence:
                self._note_starved(sequence)
                return False
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    def extend(self, sequence: Sequence, num_tokens: int, *, is_last_resort: bool = False) -> bool:
        """Extend the block table to `num_tokens`, or return False if there are no blocks for them."""
        num_missing = self.memory.num_blocks_for(sequence, num_tokens) - len(sequence.block_table)
        if num_missing <= 0:
            return True
        new_blocks = self._allocate(sequence, num_missing, is_last_resort=is_last_resort)
        sequence.block_table += new_blocks or []
        return new_blocks is not None

    def _last_idle(self, plan: Plan, sequence: Sequence) -> Sequence:
        """Return the last sequence that takes no part in this step yet.

        A heavy one does not displace a light one, unless nothing else can run: the light one may be a stem that waits.
        """
        spares_light = not (plan.is_last_resort or self.is_light(sequence))
        for other in reversed(self.running):
            if other is sequence or (other.step < plan.step and not (spares_light and self.is_light(other))):
                return other
        return sequence

    def _note_starved(self, sequence: Sequence) -> None:
        if self.starved is None or self.starved.is_finished or sequence.order < self.starved.order:
            self.starved, self._starved_at = sequence, self.shares.total

    def free_seat(self) -> None:
        """If all seats are taken, free a seat of the request with the most seats for a request without any."""
        if not self.waiting or self.num_free_seats:
            return
        newcomers = [s for s in self.waiting if not s.account.num_running and self.memory.resolve(s)]
        if newcomers:
            newcomer = min(newcomers, key=lambda s: (s.account.priority, _turn_of(s), s.order))
            if (victim := self._last_that_yields(newcomer)) is not None:
                account = victim.account
                beams = [s for s in self.running if s.account is account]
                for sequence in beams if account.is_search else [victim]:
                    sequence.left_seat_at = sequence.num_computed
                    self.preempt(sequence)

    def _last_that_yields(self, newcomer: Sequence) -> Sequence | None:
        """Return the sequence that gives its seat to `newcomer`, if any.

        It belongs to the request with most seats. A light newcomer also takes a seat from the client with most seats, or
        from a sequence that needs more.
        """
        seated = [sequence for sequence in self.running if _may_yield(sequence, newcomer)]
        if not seated:
            return None
        most = max(seated, key=lambda s: (s.account.num_seats, s.order, s.index))
        if most.account.num_seats > 1:
            return most
        if not self.is_light(newcomer):
            return None  # if large requests took seats from each other, each would lose its work in turn
        if not newcomer.account.client.num_seats:
            most = max(seated, key=lambda s: (s.account.client.num_seats, s.order))
            if most.account.client.num_seats > 1:
                return most
        return self._largest_that_yields(seated, newcomer)

    def _largest_that_yields(self, seated: list[Sequence], newcomer: Sequence) -> Sequence | None:
        """Return the sequence that gives its seat to a light newcomer because it needs more, if any.

        It is heavy from then on, even if it keeps one of the seats of heavy ones: otherwise it would lose each seat.
        """
        num_heavy = self._num_seats_of_heavy()
        for largest in sorted(seated, key=_turn_of, reverse=True):
            if _turn_of(largest) - _turn_of(newcomer) <= self.config.max_light_tokens / 4:
                return None
            num_heavy += self.is_light(largest)
            largest.account.is_large = True
            if num_heavy > self._num_heavy_seats:
                return largest
        return None

    @property
    def _num_heavy_seats(self) -> int:
        """The seats of heavy sequences while light ones wait: a quarter, but one of several, or the only one in turn."""
        num_seats = self.config.max_sequences
        return max(num_seats // 4, int(num_seats > 1 or self._seat_credit > 0))

    def note_step(self, seconds: float) -> None:
        """Note the time of a step: that of light sequences earns heavy ones a share of it with the only seat."""
        if self.config.max_sequences == 1 and self.waiting:
            earned = -seconds if self._num_seats_of_heavy() else SHARE_BESIDE * seconds
            self._seat_credit = min(max(self._seat_credit + earned, -MAX_SEAT_CREDIT), MAX_SEAT_CREDIT)

    def _num_seats_of_heavy(self) -> int:
        return sum(account.num_seats for account in {s.account for s in self.running if not self.is_light(s)})

    def make_room(self) -> Sequence | None:
        """Preempt later sequences for the oldest one that lacks blocks, once it has waited long enough; return it."""
        starved = self.starved
        if starved is None or self.shares.total - self._starved_at < PATIENCE:
            return None
        self._starved_at = self.shares.total
        if starved.is_finished or not self.memory.resolve(starved):
            self.starved = None
            return None
        num_held = len(self.memory.find_cached(starved).blocks) if starved.is_waiting else len(starved.block_table)
        num_needed = self.memory.num_blocks_for(starved, len(starved.token_ids))
        later = [sequence for sequence in self.running if sequence.order > starved.order]
        while later and self.blocks.num_available < num_needed - num_held:
            self.preempt(later.pop())
        return starved

    def num_seats_for_heavy(self, plan: Plan) -> int:
        """Return how many of the free seats are not for light sequences."""
        return min(max(self._num_heavy_seats - self._num_seats_of_heavy(), 0), plan.seats_left)

    def _has_its_share(self, stem: Sequence) -> bool:
        """Return whether a request has at least its share of the seats while another request has none."""
        if all(sequence.account.num_running for sequence in self.waiting):
            return False
        return stem.account.num_seats >= max(self.config.max_sequences // self.shares.num_requests, 1)

    def preempt_blocker(self) -> bool:
        """Take slots from sequences that are done for this step, or preempt the last one if one before it waits.

        Return whether that was possible. Beams that are done for this step, and stems, hold blocks and slots that an
        earlier request, or another beam, may otherwise lack for ever. So do sequences that run and hold some of the pages
        that they read together. A stem that runs alone may hold a block that its own candidate lacks.
        """
        if not self.running:
            return False
        last = self.running[-1]
        lacks_slot = len(self.running) > 1 and not self.media.slots.num_available
        done = [sequence for sequence in self.running if lacks_slot and sequence.is_computed and sequence.media_slots]
        if done:
            for sequence in done:
                self.memory.release_media(sequence)
            return True
        is_lone_stem = last.is_stem and last.is_computed and len(self.running) == 1
        lacks_block = is_lone_stem and self.starved in self.waiting[:1]
        if lacks_slot or lacks_block or (self.waiting and _gives_way(last, self.waiting[0])):
            self.preempt(last)
            return True
        return False

    def preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self._end_running(sequence)
        self.memory.release(sequence)
        self._wait(sequence)


def _turn_of(sequence: Sequence) -> float:
    return sequence.account.need(sequence.num_left) + sequence.account.age


def _gives_way(last: Sequence, waiting: Sequence) -> bool:
    """Return whether a sequence that runs gives way to one that waits: of an earlier request, or another beam of its own.

    A beam that is not done goes on first, and the candidates of a stem share its blocks.
    """
    is_done_beam = last.is_computed and not last.is_stem
    return waiting.order < last.order or (waiting.order == last.order and is_done_beam)


def _may_yield(sequence: Sequence, newcomer: Sequence) -> bool:
    """Return whether a sequence may lose its seat to another request, of the same or a higher priority.

    A sequence that has lost a seat keeps the next one until it has computed more than before, or it would lose its work for
    ever. A computed stem has none.
    """
    has_advanced = sequence.num_computed > sequence.left_seat_at
    has_seat = not (sequence.is_stem and sequence.is_computed)
    return has_advanced and has_seat and sequence.account.priority >= newcomer.account.priority
