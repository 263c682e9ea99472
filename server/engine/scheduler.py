"""Chooses what runs in a step: small needs first, then large ones, within budgets of time, tokens, frames, blocks, slots.

A long prompt is computed in pieces. A piece ends before the first token whose media item is not there yet, so a sequence
waits only for its own pixels. When blocks run out, the last sequence releases its blocks and waits again.

A request is *light* while its need (see `shares`) is small, else *heavy*. A step takes light sequences first. While there
are any, heavy ones run on credit, which grows with the time of light ones: they slow them down by no more than their
share, and always advance. Requests of a lower priority *yield*: they run when nothing else does, and in every eighth step.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection
from dataclasses import dataclass, field
from math import inf
from operator import attrgetter

from server.engine.block_pool import BlockPool
from server.engine.config import EngineConfig
from server.engine.media_cache import Encoding, MediaCache
from server.engine.sequence import Sequence
from server.engine.shares import CONTEXT_PER_TOKEN, TOKENS_PER_FRAME, Pace, Shares, count_within, work_of

# time of heavy sequences per time of light ones
HEAVY_SHARE = 0.5
# smaller pieces would read the context of a long prompt too often
MIN_PIECE = 16
YIELD_EVERY = 8
# work done for others after which a sequence that lacks blocks takes those of later requests
PATIENCE = 2048


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
    pace: Pace = field(default_factory=Pace)
    seats_left: int = 0
    num_newcomer_seats: int = 0  # of these, those for requests of which no sequence runs
    in_progress: set[bytes] = field(default_factory=set)  # hashes of the blocks that are being computed
    work: float = 0.0
    num_frames: int = 0
    seconds: float = 0.0  # that the step is expected to take
    max_seconds: float = inf
    # the next piece may take longer, and the next media item may have more frames: otherwise a large one would never run
    may_exceed: bool = True
    is_last_resort: bool = False  # nothing else can run, so nothing is kept for others

    def has_time_for(self, seconds: float) -> bool:
        return self.seconds + seconds <= self.max_seconds

    def has_room_for(self, num_frames: int) -> bool:
        """Return whether a media item can be encoded; one with more frames than the budget is encoded alone."""
        is_within = num_frames <= self.frames_left and self.has_time_for(num_frames * self.pace.per_frame)
        return is_within or (self.may_exceed and not self.encodings)

    def add_encoding(self, encoding: Encoding, num_frames: int) -> None:
        self.encodings.append(encoding)
        self.frames_left -= num_frames
        self.num_frames += num_frames
        self.seconds += num_frames * self.pace.per_frame


@dataclass(slots=True)
class Group:
    """Sequences that want to run: those that decode, and those with a prompt to compute, running or waiting."""

    decoding: list[Sequence] = field(default_factory=list)
    prompts: list[Sequence] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decoding or self.prompts)


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
        self.pace = Pace()
        self._shares = Shares()
        self._all_previous = all_previous
        self._copies: list[tuple[int, int]] = []
        self._step = 0
        self._credits = [0.0, 0.0]  # seconds that heavy sequences may run next to light ones: decoding, prompts
        self._starved: Sequence | None = None  # the oldest that lacks blocks
        self._starved_at = 0.0  # the work that was done for all when its patience began
        self._num_kept_blocks = config.num_blocks // 16  # that heavy sequences leave to light ones

    def add(self, sequence: Sequence) -> list[bytes]:
        """Queue a sequence; return the sources to request."""
        self.queue(sequence)
        return self.media.request(self._missing_sources(sequence))

    def queue(self, sequence: Sequence) -> None:
        """Queue a sequence that the scheduler does not know yet."""
        self._open_account(sequence)
        self._wait(sequence)

    def schedule(self) -> Plan:
        plan = self._begin_step()
        if self._can_run_together(plan):
            self._fill(plan, list(self.running), inf)
        else:
            self._fill_by_turns(plan)
        self._fill_at_last(plan)
        # side work encodes media next to the rows
        plan.max_seconds = (1 + HEAVY_SHARE) * plan.seconds if plan.rows else self._limit()
        plan.may_exceed = True
        return plan

    def _begin_step(self) -> Plan:
        self._step += 1
        self._shares.compare_clients()
        self._free_seat()
        max_frames = self.config.max_frames_per_step if self.running else self.config.max_frames_idle
        plan = Plan(self.config.max_tokens_per_step, max_frames, copies=self._copies, pace=self.pace)
        self._copies = []
        plan.seconds = self.pace.fixed
        plan.seats_left = self._num_admissible()
        plan.in_progress = self._next_blocks(self.running) if self.waiting else set()
        return plan

    def _can_run_together(self, plan: Plan) -> bool:
        """Return whether all that can run decode, with one priority, in a step so short that turns would gain nothing."""
        if not self.running or (self.waiting and plan.seats_left) or len(self.running) > plan.tokens_left:
            return False
        context, first = 0, self.running[0].account.priority
        for sequence in self.running:
            context += sequence.num_computed
            if len(sequence.token_ids) - sequence.num_computed > 1 or sequence.account.priority != first:
                return False
        work = len(self.running) * work_of(1, 0) + context / CONTEXT_PER_TOKEN
        return plan.seconds + work * plan.pace.per_work <= self._short_step()

    def _fill_by_turns(self, plan: Plan) -> None:
        self._serve_starved(plan)
        light, heavy, yielding = self._groups(plan)
        self._fill_light(plan, light, heavy)
        self._fill_heavy(plan, heavy)
        self._fill_yielding(plan, yielding)

    def _groups(self, plan: Plan) -> tuple[Group, Group, Group]:
        """Return the light sequences, the heavy ones, and those with a lower priority than others."""
        able = [s for s in self.running if s.num_computed < len(s.token_ids) and s.step < self._step]
        if plan.seats_left:
            able += self._admissible(plan)
        first = min((sequence.account.priority for sequence in able), default=0)
        light, heavy, yielding = Group(), Group(), Group()
        for sequence in able:
            account, num_left = sequence.account, sequence.num_left
            need = account.need(num_left)
            sequence.turn = need + account.age
            is_first, is_light = account.priority == first, need <= self.config.max_light_tokens
            group = (light if is_light else heavy) if is_first else yielding
            (group.prompts if num_left > 1 or sequence.is_waiting else group.decoding).append(sequence)
        return light, heavy, yielding

    def _admissible(self, plan: Plan) -> list[Sequence]:
        """Return the waiting sequences whose media are known; the last seat is for a request that has none."""
        known = [sequence for sequence in self.waiting if self._resolve(sequence)]
        for sequence in known:
            if sequence.num_missing is None:
                num_cached = len(self._cached_prefix(sequence)) * self.config.block_size
                sequence.num_missing = len(sequence.token_ids) - num_cached
        plan.num_newcomer_seats = int(any(not sequence.account.num_running for sequence in known))
        return known

    def _fill_light(self, plan: Plan, light: Group, heavy: Group) -> None:
        """Add light sequences; a quarter of the tokens and seats is kept for heavy ones that want them."""
        num_tokens = plan.tokens_left // 4 if heavy else 0
        num_seats = self._num_seats_for_heavy(plan) if any(s.is_waiting for s in heavy.prompts) else 0
        plan.tokens_left -= num_tokens
        plan.seats_left -= num_seats
        limit = self._limit()
        self._fill_group(plan, light, limit)
        plan.tokens_left += num_tokens
        plan.seats_left += num_seats

    def _fill_heavy(self, plan: Plan, heavy: Group) -> None:
        kinds = [heavy.decoding, heavy.prompts]
        if not plan.rows or self.config.step_seconds == inf:
            self._credits = [0.0, 0.0]
            self._fill_group(plan, heavy, self._limit())
            return
        earned = HEAVY_SHARE * plan.seconds / max(sum(map(bool, kinds)), 1)
        most = self.config.step_seconds / 4
        for kind, sequences in enumerate(kinds):
            credit = min(self._credits[kind] + earned, most) if sequences else 0.0
            before = plan.seconds
            is_shared = kind == 0 and bool(heavy.prompts)
            free = (2 * self.pace.fixed - before) / (1 + is_shared)
            self._fill(plan, _in_turn(sequences), before + max(credit, free), may_exceed=credit == most)
            self._credits[kind] = max(credit - (plan.seconds - before), -most)

    def _fill_yielding(self, plan: Plan, yielding: Group) -> None:
        sequences = yielding.decoding + yielding.prompts
        if not plan.rows:
            self._fill(plan, sorted(sequences, key=lambda s: (s.account.priority, s.turn)), self._limit())
        elif self._step % YIELD_EVERY == 0:
            self._fill(plan, _in_turn(sequences), 2 * plan.seconds)

    def _fill_at_last(self, plan: Plan) -> None:
        """If nothing runs, let sequences have what was kept for others, and what idle ones after them hold."""
        if plan.rows:
            return
        plan.is_last_resort = True
        self._fill(plan, self.running + self.waiting, self._limit())
        while not plan.rows and self._preempt_blocker():
            plan.seats_left = self._num_admissible()
            self._fill(plan, list(self.waiting), self._limit())

    def _fill_group(self, plan: Plan, group: Group, seconds: float) -> None:
        """Add rows of a group; decoding comes first, with at most half of the time if there are prompts."""
        self._fill(plan, _in_turn(group.decoding), (plan.seconds + seconds) / 2 if group.prompts else seconds)
        self._fill(plan, _in_turn(group.prompts), seconds)

    def _fill(self, plan: Plan, sequences: list[Sequence], seconds: float, *, may_exceed: bool = True) -> None:
        """Add rows of these sequences, in this order, until the step takes `seconds`."""
        plan.max_seconds, plan.may_exceed = seconds, may_exceed
        for sequence in sequences:
            if plan.tokens_left <= 0:
                return
            if not sequence.is_waiting:
                self._run(plan, sequence)
            elif not self._try_to_admit(plan, sequence):
                return

    def _limit(self) -> float:
        """Return how long a step may take. To read the weights is no row's fault, and rows may take as long again."""
        return max(self.config.step_seconds, 2 * self.pace.fixed)

    def _short_step(self) -> float:
        return max(self.config.step_seconds / 4, 2 * self.pace.fixed)

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Let `child` continue from its parent's last token; without blocks for its tokens, return False and do nothing.

        Full blocks are shared, the last one is copied, and media get a second reference.
        """
        num_full, remainder = divmod(parent.num_computed, self.config.block_size)
        num_new = self._num_blocks_for(len(child.token_ids)) - num_full
        self._open_account(child)
        child.num_computed = parent.num_computed
        new_blocks = self._allocate(child, num_new) if parent.block_table else None
        if new_blocks is None:
            child.num_computed = 0
            self._shares.close(child.request_id)
            return False
        shared = parent.block_table[:num_full]
        self.blocks.share(shared)
        child.block_table = shared + new_blocks
        if remainder:
            self._copies.append((parent.block_table[num_full], new_blocks[0]))
        child.media_slots = {key: self.media.slots.acquire(key) for key in parent.media_slots}
        self._begin_running(child)
        return True

    def fork_stem(self, stem: Sequence, child: Sequence) -> bool:
        """Fork within the limit of running sequences, and within the request's share of them while others wait.

        If no other candidate runs, requests that came after this one are preempted for it.
        """
        if not self._num_admissible() or self._has_its_share(stem):
            return False
        while not self.fork(stem, child):
            if stem.account.num_running > 1 or not stem.block_table or self.running[-1].order <= stem.order:
                return False
            self._preempt(self.running[-1])
        return True

    def commit(self, plan: Plan, failed: Collection[Sequence] = ()) -> None:
        """Note that the step's keys and values are computed: publish full blocks, release media that no later token reads.

        Blocks of `failed` sequences are not published.
        """
        size = self.config.block_size
        for row in plan.rows:
            sequence = row.sequence
            if sequence in failed:
                continue
            sequence.num_computed += row.count
            sequence.num_scored = max(sequence.num_scored, sequence.num_computed)
            for block in range(row.start // size, sequence.num_computed // size):
                digest = sequence.block_hash(block, size)
                self.blocks.publish(sequence.block_table[block], digest)
            if row.start < sequence.num_prompt_tokens:  # later tokens read the same media as the prompt's last
                self._release_read_media(sequence)

    def finish(self, sequence: Sequence) -> None:
        """End a sequence, running or waiting, and release what it holds."""
        sequence.is_finished = True
        self._release(sequence)
        if sequence.is_waiting:
            self.waiting.remove(sequence)
        else:
            self._end_running(sequence)
        self._shares.close(sequence.request_id)

    def _missing_sources(self, sequence: Sequence) -> list[bytes]:
        """Return sources that were never supplied and, after a cached prefix, those that are no longer in any cache."""
        first = 0
        if self._resolve(sequence):
            num_cached = len(self._cached_prefix(sequence)) * self.config.block_size
            first = max(sequence.media_index[num_cached], 0)
        keys = ((source, self.media.key(source)) for source in sequence.sources[first:])
        return [source for source, key in keys if key is None or not self.media.is_ready(key)]

    def _open_account(self, sequence: Sequence) -> None:
        order = sequence.order
        sequence.account = self._shares.open(sequence.request_id, order.client, order.priority)

    def _wait(self, sequence: Sequence) -> None:
        sequence.is_waiting = True
        sequence.num_missing = None
        insort(self.waiting, sequence, key=lambda s: s.order)

    def _begin_running(self, sequence: Sequence) -> None:
        sequence.account.note_running(1)
        insort(self.running, sequence, key=lambda s: s.order)

    def _end_running(self, sequence: Sequence) -> None:
        sequence.account.note_running(-1)
        self.running.remove(sequence)

    def _is_light(self, sequence: Sequence) -> bool:
        return sequence.account.need(sequence.num_left) <= self.config.max_light_tokens

    def _run(self, plan: Plan, sequence: Sequence) -> None:
        """Add a row of a running sequence, if it can run."""
        count = self._num_runnable(sequence, plan)
        if count and self._grow(plan, sequence, sequence.num_computed + count):
            self._add_row(plan, sequence, count)

    def _try_to_admit(self, plan: Plan, sequence: Sequence) -> bool:
        """Admit a waiting sequence if it can run; return False if those after it must wait for it."""
        if plan.seats_left <= 0:
            return False
        if not self._resolve(sequence):
            return True
        is_newcomer = not sequence.account.num_running
        if plan.seats_left <= plan.num_newcomer_seats and not (is_newcomer or plan.is_last_resort):
            return True
        if self._first_missing_block(sequence) in plan.in_progress:
            sequence.num_missing = None
            return True
        num_cached_media = self.media.num_cached(sequence.keys)
        if not self._reserve(plan, sequence):
            return False  # those after it do not overtake for lack of blocks, or a long prompt would wait for ever
        if count := self._num_runnable(sequence, plan):
            self._admit(plan, sequence, num_cached_media)
            self._add_row(plan, sequence, count)
            plan.in_progress |= self._next_blocks([sequence])
        else:
            self._release(sequence)
        return True

    def _next_blocks(self, running: Collection[Sequence]) -> set[bytes]:
        """Return the hash of each sequence's next full block: others that need it wait for it instead of computing it."""
        size = self.config.block_size
        blocks = ((sequence, sequence.num_computed // size) for sequence in running)
        return {s.block_hash(block, size) for s, block in blocks if (block + 1) * size <= len(s.token_ids)}

    def _first_missing_block(self, sequence: Sequence) -> bytes | None:
        """Return the hash of a waiting sequence's first block that is not cached but could be."""
        num_cached, size = len(self._cached_prefix(sequence)), self.config.block_size
        could_be_cached = num_cached < sequence.first_computed // size
        return sequence.block_hash(num_cached, size) if could_be_cached else None

    def _num_admissible(self) -> int:
        """Return how many more sequences may run; computed stems do not count, as they take no part in steps."""
        num_stems = sum(sequence.is_stem and sequence.is_computed for sequence in self.running)
        return max(self.config.max_sequences - len(self.running) + num_stems, 0)

    def _add_row(self, plan: Plan, sequence: Sequence, count: int) -> None:
        start = sequence.num_computed
        samples = start + count == len(sequence.token_ids)
        work = work_of(count, start, count if start < sequence.scored.stop else 1)
        plan.rows.append(Row(sequence, start, count, samples))
        plan.tokens_left -= count
        plan.work += work
        plan.seconds += work * plan.pace.per_work
        plan.may_exceed = False
        sequence.step = self._step
        # while a prompt is computed its need stays the same, so that prompts of one length take turns by age
        self._shares.charge(sequence.account, work, count if start < sequence.num_prompt_tokens else work)

    def _admit(self, plan: Plan, sequence: Sequence, num_cached_media: int) -> None:
        self.waiting.remove(sequence)
        sequence.is_waiting = False
        self._begin_running(sequence)
        plan.seats_left -= 1
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.num_cached_tokens = sequence.num_computed
            sequence.num_cached_media = num_cached_media
            plan.admitted.append(sequence)

    def _resolve(self, sequence: Sequence) -> bool:
        """Return whether the content keys of all media are known: the prefix cache is keyed by them."""
        if len(sequence.keys) < len(sequence.sources):
            keys = [self.media.key(source) for source in sequence.sources]
            sequence.keys = [key for key in keys if key is not None]
        return len(sequence.keys) == len(sequence.sources)

    def _reserve(self, plan: Plan, sequence: Sequence) -> bool:
        """Assign blocks to a sequence for all of its tokens: shared ones for a cached prefix, new ones for the rest."""
        cached = self._cached_prefix(sequence)
        self.blocks.share(cached)
        num_new = self._num_blocks_for(len(sequence.token_ids)) - len(cached)
        new_blocks = self._allocate(sequence, num_new, is_last_resort=plan.is_last_resort)
        if new_blocks is None:
            self.blocks.release(cached)
            self._note_starved(sequence)
            return False
        sequence.block_table = cached + new_blocks
        sequence.num_computed = len(cached) * self.config.block_size
        return True

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        blocks = []
        for block in range(sequence.first_computed // self.config.block_size):
            cached = self.blocks.find(sequence.block_hash(block, self.config.block_size))
            if cached is None:
                break
            blocks.append(cached)
        return blocks

    def _allocate(self, sequence: Sequence, count: int, *, is_last_resort: bool = False) -> list[int] | None:
        """Take blocks. Heavy sequences leave some to light ones, except for the oldest, which must be able to end."""
        num_kept = self._num_kept_blocks
        if is_last_resort or self._is_oldest(sequence) or self._is_light(sequence):
            num_kept = 0
        if self.blocks.num_available - count < num_kept:
            return None
        if sequence is self._starved:
            self._starved = None
        return self.blocks.allocate(count)

    def _is_oldest(self, sequence: Sequence) -> bool:
        if not self.running or sequence is self.running[0]:
            return True
        return sequence.order <= self.running[0].order and sequence.account.num_running <= 1

    def _grow(self, plan: Plan, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the block table to `num_tokens`, preempting the last sequences; False if this one cannot run."""
        num_missing = self._num_blocks_for(num_tokens) - len(sequence.block_table)
        if num_missing <= 0:
            return True
        while (new_blocks := self._allocate(sequence, num_missing, is_last_resort=plan.is_last_resort)) is None:
            victim = self._last_idle(sequence)
            if victim is sequence and self.running[-1] is not sequence:
                self._note_starved(sequence)
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table += new_blocks
        return True

    def _last_idle(self, sequence: Sequence) -> Sequence:
        """Return the last sequence that takes no part in this step yet; a heavy one does not displace a light one."""
        spares_light = not self._is_light(sequence)
        for other in reversed(self.running):
            if other is sequence or (other.step < self._step and not (spares_light and self._is_light(other))):
                return other
        return sequence

    def _note_starved(self, sequence: Sequence) -> None:
        if self._starved is None or self._starved.is_finished or sequence.order < self._starved.order:
            self._starved, self._starved_at = sequence, self._shares.total

    def _serve_starved(self, plan: Plan) -> None:
        """Let the oldest sequence that lacks blocks run first once its patience ends, with the blocks of later ones."""
        starved = self._starved
        if starved is None or self._shares.total - self._starved_at < PATIENCE:
            return
        self._starved_at = self._shares.total
        if starved.is_finished or not self._resolve(starved):
            self._starved = None
            return
        num_held = len(self._cached_prefix(starved)) if starved.is_waiting else len(starved.block_table)
        num_needed = self._num_blocks_for(len(starved.token_ids))
        later = [sequence for sequence in self.running if sequence.order > starved.order]
        while later and self.blocks.num_available < num_needed - num_held:
            self._preempt(later.pop())
        plan.seats_left = self._num_admissible()
        plan.is_last_resort = True
        self._fill(plan, [starved], self._limit())
        plan.is_last_resort = False

    def _free_seat(self) -> None:
        """If all seats are taken, take one for a request that has none from the one that has most."""
        if not self.waiting or self._num_admissible():
            return
        newcomers = [s for s in self.waiting if not s.account.num_running and self._resolve(s)]
        if newcomers:
            newcomer = min(newcomers, key=lambda s: (s.account.priority, _place_of(s), s.order))
            if (victim := self._last_that_yields(newcomer)) is not None:
                self._preempt(victim)

    def _last_that_yields(self, newcomer: Sequence) -> Sequence | None:
        """Return one of the request with most seats or, for a light newcomer, of such a client or one with a larger need."""
        # a beam that waits for the others keeps its seat, or a search of more beams than seats would never advance
        seated = [sequence for sequence in self.running if not sequence.is_computed]
        if not seated:
            return None
        most = max(seated, key=lambda s: (s.account.num_running, s.order, s.index))
        if most.account.num_running > 1:
            return most
        if not self._is_light(newcomer):
            return None  # large requests that took seats from one another would lose their work in turn
        if not newcomer.account.client.num_running:
            most = max(seated, key=lambda s: (s.account.client.num_running, s.order))
            if most.account.client.num_running > 1:
                return most
        num_heavy = sum(not self._is_light(s) for s in seated)
        if num_heavy <= self.config.max_sequences // 4:
            seated = list(filter(self._is_light, seated))
        most = max(seated, key=_place_of, default=newcomer)
        return most if _place_of(most) - _place_of(newcomer) > self.config.max_light_tokens / 4 else None

    def _num_seats_for_heavy(self, plan: Plan) -> int:
        """Return how many of the free seats are not for light sequences: heavy ones may have a quarter of all."""
        num_heavy = sum(not self._is_light(sequence) for sequence in self.running)
        return min(max(self.config.max_sequences // 4 - num_heavy, 0), plan.seats_left)

    def _has_its_share(self, stem: Sequence) -> bool:
        """Return whether a request has its share of the seats while another one has none."""
        if all(sequence.account.num_running for sequence in self.waiting):
            return False
        return stem.account.num_running > max(self.config.max_sequences // self._shares.num_requests, 1)

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
        self._end_running(sequence)
        self._release(sequence)
        self._wait(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0
        for key in sequence.media_slots:
            self.media.slots.release(key)
        sequence.media_slots.clear()

    def _num_runnable(self, sequence: Sequence, plan: Plan) -> int:
        """Return how many tokens can run now: within the budgets, up to the first whose media are not available."""
        start, media_index = sequence.num_computed, sequence.media_index
        count = min(len(sequence.token_ids) - start, plan.tokens_left)
        if count > 0 and plan.max_seconds < inf:
            count = self._num_in_time(sequence, plan, count)
        if count <= 0:
            return 0  # without budget, or a beam that waits for the others, or a stem
        for media in range(max(media_index[start], 0), media_index[start + count - 1] + 1):
            if not self._hold(sequence, media, plan):
                return max(sequence.first_token_of(media), start) - start
        return count

    def _num_in_time(self, sequence: Sequence, plan: Plan, count: int) -> int:
        """Return how many of `count` tokens there is time for, none if that would be too small a piece."""
        if not plan.pace.per_work:
            return count
        start, least = sequence.num_computed, min(count, MIN_PIECE)
        work = (plan.max_seconds - plan.seconds) / plan.pace.per_work
        num_within = count_within(work, start, reads_all_logits=start < sequence.scored.stop)
        if num_within < least:
            return least if plan.may_exceed else 0
        return min(count, num_within)

    def _hold(self, sequence: Sequence, media: int, plan: Plan) -> bool:
        """Hold a slot for every page that a token with this media index reads."""
        for read in range(media + 1) if self._all_previous else (media,):
            key = sequence.keys[read]
            if key not in sequence.media_slots:
                slot = self._slot(sequence, key, sequence.sources[read], plan)
                if slot is None:
                    return False
                sequence.media_slots[key] = slot
        return True

    def _slot(self, sequence: Sequence, key: bytes, source: bytes, plan: Plan) -> int | None:
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
        self._shares.charge(sequence.account, num_frames * TOKENS_PER_FRAME, num_frames * TOKENS_PER_FRAME)
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


def _in_turn(sequences: list[Sequence]) -> list[Sequence]:
    return sorted(sequences, key=attrgetter("turn"))


def _place_of(sequence: Sequence) -> float:
    return sequence.account.need(sequence.num_left) + sequence.account.age
