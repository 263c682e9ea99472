"""Chooses what runs in a step: small needs first, then large ones, within budgets of time, tokens, frames, blocks, slots.

A long prompt is computed in pieces. A piece ends before the first token whose media item is not there yet, so a sequence
waits only for its own pixels. The small pieces of a sequence that runs alone wait for the media that follow: each piece
reads all weights. When blocks run out, the last sequence releases its blocks and waits again.

A request is *light* while its need (see `shares`) is small and no smaller one has waited for its seat, else *heavy*. A step
takes light sequences first. While there are any, heavy ones run on credit, which grows with the time of light ones: they
slow them down by no more than their share, and always advance. In a quarter of the steps, age decides instead of need
between the requests of a client. Requests of a lower priority *yield*: they run when nothing else does, and in every eighth
step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import inf
from operator import attrgetter
from random import Random

from server.engine.ahead import rows_after
from server.engine.lookup import num_worthwhile
from server.engine.pace import MAX_DEBT, SHARE_BESIDE, Pace
from server.engine.plan import Group, Plan, Row
from server.engine.residents import Residents
from server.engine.sequence import Sequence
from server.engine.shares import BY_AGE_SHARE, CONTEXT_PER_TOKEN, TOKENS_PER_FRAME, count_within, rounded_piece, work_of

# in every fourth step, a piece that is cut for lack of time is cut to half that length: steps of different sizes show which
# part of their time is fixed and which grows with the tokens
PROBE_EVERY = 4
# smaller pieces wait for the media that follow them, if these are being encoded
MIN_PIECE_BEFORE_MEDIA = 64
YIELD_EVERY = 8


class Scheduler:
    """Fills each step with rows of the residents."""

    def __init__(
        self,
        residents: Residents,
        clock: Callable[[], float],
        never_proposed: Collection[int],
    ) -> None:
        self.config, self.running, self.waiting = residents.config, residents.running, residents.waiting
        self._residents = residents
        self._media = residents.media
        self._memory, self._shares = residents.memory, residents.shares
        self._step = 0
        self.pace = Pace(self.config.step_seconds, clock)
        self._never_proposed = never_proposed  # ids that are never sampled, or end an answer
        self._random = Random(0)
        self._max_credit = self.config.step_seconds / 4
        self._credits = [0.0, 0.0]  # seconds left to heavy sequences next to light ones: decoding, prompts

    def schedule(self, num_kept_frames: int = 0) -> Plan:
        """Return the next step; `num_kept_frames` are left to side work, as far as the step's limit of frames allows."""
        plan = self._begin_step()
        plan.num_kept_frames = num_kept_frames
        if self._can_run_together(plan):
            self._fill(plan, list(self.running), inf)
        else:
            self._fill_by_turns(plan)
        plan.num_kept_frames = 0
        self._fill_at_last(plan)
        if plan.rows:
            self._residents.note_step(plan.seconds)
        return plan

    def schedule_after(self, before: Plan) -> Plan | None:
        """Return the step after one whose results are not known yet: the next token of each of its sequences.

        None if it may have to be another one, because something waits, or if it depends on the results.
        """
        rows = rows_after(before, len(self.running), may_propose=bool(self.config.speculative_tokens))
        if not rows or self._residents.starved or any(map(self._memory.resolve, self.waiting)):
            return None
        seconds = self.pace.fixed + self.pace.per_work * sum(work_of(1, row.start) for row in rows)
        if seconds > self.pace.longest_without_turns() or len(rows) > self.config.max_tokens_per_step:
            return None
        # they preempt no other sequence
        if not all(self._residents.extend(row.sequence, row.end) for row in rows):
            return None
        plan = self._begin_step()
        for row in rows:
            self._add_row(plan, row)
        return plan

    def _begin_step(self) -> Plan:
        self._step += 1
        self.pace.note_requests(self._shares)
        self._shares.compare_clients()
        self._residents.free_seat()
        config = self.config
        budgets = config.max_tokens_per_step, config.max_frames_per_step, config.max_frames_idle
        copies, self._residents.copies = [(source, to) for to, source in self._residents.copies.items()], {}
        plan = Plan(self._step, *budgets, config.overlaps, copies=copies, pace=self.pace, seconds=self.pace.fixed)
        self._note_running(plan)
        return plan

    def _note_running(self, plan: Plan) -> None:
        """Note the free seats and what running sequences compute, in a plan without rows."""
        plan.seats_left = self._residents.num_free_seats
        for sequence in self.running if self.waiting else ():
            plan.note_progress(sequence, self._memory.next_blocks(sequence))
        plan.shots = self._memory.shots_in_part(self.running)

    def _can_run_together(self, plan: Plan) -> bool:
        """Return whether all that can run decode, with one priority, in a step so short that turns would gain nothing."""
        if not self.running or self._residents.starved or len(self.running) > plan.tokens_left:
            return False
        if self.waiting and (plan.seats_left or not all(map(self._needs_free_seat, self.waiting))):
            return False
        context, first = 0, self.running[0].account.priority
        for sequence in self.running:
            context += sequence.num_computed
            if len(sequence.token_ids) - sequence.num_computed > 1 or sequence.account.priority != first:
                return False
        work = len(self.running) * work_of(1, 0) + context / CONTEXT_PER_TOKEN
        return plan.seconds + work * plan.pace.per_work <= self.pace.longest_without_turns()

    def _fill_by_turns(self, plan: Plan) -> None:
        self._serve_starved(plan)
        light, heavy, yielding = self._groups(plan)
        self._fill_light(plan, light, heavy)
        self._fill_heavy(plan, heavy)
        self._fill_yielding(plan, yielding)

    def _groups(self, plan: Plan) -> tuple[Group, Group, Group]:
        """Return the light sequences, the heavy ones, and those with a lower priority than others."""
        able = [s for s in self.running if s.num_computed < len(s.token_ids) and s.step < self._step]
        able += self._admissible(plan)
        first = min((sequence.account.priority for sequence in able), default=0)
        age_decides = self._random.random() < BY_AGE_SHARE
        light, heavy, yielding = Group(), Group(), Group()
        for sequence in able:
            account, num_left = sequence.account, sequence.num_left
            sequence.turn = account.age + (account.client.surplus if age_decides else account.need(num_left))
            is_first, is_light = account.priority == first, self._residents.is_light(sequence)
            group = (light if is_light else heavy) if is_first else yielding
            (group.prompts if num_left > 1 or sequence.is_waiting else group.decoding).append(sequence)
        return light, heavy, yielding

    def _admissible(self, plan: Plan) -> list[Sequence]:
        """Return the waiting sequences whose media are known, and for which there may be a seat.

        The last seat is for a request that has none.
        """
        waiting = self.waiting if plan.seats_left else [s for s in self.waiting if not self._needs_free_seat(s)]
        known = list(filter(self._memory.resolve, waiting))
        for sequence in known:
            if sequence.num_missing is None or sequence.layout is None:
                self._memory.look_for_cached(sequence)
        plan.num_newcomer_seats = int(any(not sequence.account.num_running for sequence in known))
        return known

    def _fill_light(self, plan: Plan, light: Group, heavy: Group) -> None:
        """Add light sequences; a quarter of the tokens and seats, and a frame, are kept for heavy ones that want them."""
        num_tokens = plan.tokens_left // 4 if heavy else 0
        num_seats = self._residents.num_seats_for_heavy(plan) if any(s.is_waiting for s in heavy.prompts) else 0
        # in every second step: a prompt that is due may wait for something else
        num_frames = int(bool(heavy.prompts) and self._credits[1] >= self._max_credit) * (self._step % 2)
        plan.tokens_left -= num_tokens
        plan.seats_left -= num_seats
        plan.num_kept_frames += num_frames
        self._fill_group(plan, light, self.pace.longest())
        plan.tokens_left += num_tokens
        plan.seats_left += num_seats
        plan.num_kept_frames -= num_frames

    def _fill_heavy(self, plan: Plan, heavy: Group) -> None:
        kinds = [heavy.decoding, heavy.prompts]
        if plan.is_empty or self.config.step_seconds == inf:
            self._fill_group(plan, heavy, self.pace.longest())
            # next to light sequences that arrive now, prompts begin with the debt of such a step
            self._credits = [
                0.0,
                -self.config.step_seconds if any(s.step == self._step for s in heavy.prompts) else 0.0,
            ]
            return
        earned = SHARE_BESIDE * plan.seconds / max(sum(map(bool, kinds)), 1)
        for kind, sequences in enumerate(kinds):
            credit = min(self._credits[kind] + earned, self._max_credit) if sequences else 0.0
            before, is_shared = plan.seconds, kind == 0 and bool(heavy.prompts)
            free = ((1 + SHARE_BESIDE) * self.pace.fixed - before) / (1 + is_shared)
            # the smallest piece may take many times the credit, which later steps then have to earn
            self._fill(plan, _in_turn(sequences), before + max(credit, free), may_exceed=credit == self._max_credit)
            self._credits[kind] = max(credit - (plan.seconds - before), -MAX_DEBT)

    def _fill_yielding(self, plan: Plan, yielding: Group) -> None:
        sequences = yielding.decoding + yielding.prompts
        if plan.is_empty:
            sequences.sort(key=lambda s: (s.account.priority, s.turn))
            self._fill(plan, sequences, self.pace.longest())
        elif self._step % YIELD_EVERY == 0:
            self._fill(plan, _in_turn(sequences), 2 * plan.seconds)

    def _fill_at_last(self, plan: Plan) -> None:
        """If nothing runs, let sequences have what was kept for others, and what idle ones after them hold or release."""
        residents, num_preemptions = self._residents, -1
        while plan.is_empty:
            if num_preemptions == residents.num_preemptions and not residents.preempt_blocker():
                return
            num_preemptions, plan.is_last_resort = residents.num_preemptions, True
            self._note_running(plan)
            self._fill(plan, self.running + self.waiting, self.pace.longest())

    def _fill_group(self, plan: Plan, group: Group, seconds: float) -> None:
        """Add rows of a group; decoding comes first, with at most half of the time if prompts can use the other half."""
        decoding = _in_turn(group.decoding)
        self._fill(plan, decoding, (plan.seconds + seconds) / 2 if group.prompts else seconds)
        if group.prompts:
            self._fill(plan, _in_turn(group.prompts), seconds)
            left = [sequence for sequence in decoding if sequence.step < self._step]
            self._fill(plan, left, seconds, may_exceed=False)

    def _fill(self, plan: Plan, sequences: list[Sequence], seconds: float, *, may_exceed: bool = True) -> None:
        """Add rows of these sequences, in this order, until the step takes `seconds`."""
        plan.limit(seconds, may_exceed=may_exceed)
        for sequence in sequences:
            if plan.tokens_left <= 0:
                return
            if not sequence.is_waiting:
                self._run(plan, sequence)
            elif not self._try_to_admit(plan, sequence):
                return

    def commit(self, plan: Plan, failed: Collection[Sequence] = ()) -> None:
        """Note that the step's keys and values are computed: publish full blocks, release media that no later token reads.

        Blocks of `failed` sequences are not published, nor those of sequences that have ended since the step was launched.
        """
        for row in plan.rows:
            sequence = row.sequence
            if sequence.is_finished or sequence in failed:
                continue
            sequence.num_computed += row.count
            if sequence.num_scored < sequence.num_computed:
                sequence.num_scored = sequence.num_computed
            self._memory.publish(sequence, row.start)
            if row.start < sequence.num_prompt_tokens:  # later tokens read the same media as the prompt's last
                self._memory.release_read_media(sequence)

    def accept(self, sequence: Sequence) -> None:
        """Note that the last step has computed a sequence's last token as well, because it was proposed."""
        if not sequence.is_waiting:  # otherwise it was preempted after the step
            sequence.num_computed += 1
            self._memory.publish(sequence, sequence.num_computed - 1)

    def _run(self, plan: Plan, sequence: Sequence) -> None:
        """Add a row of a running sequence, if it can run."""
        if not self._has_seat(plan, sequence):
            return
        if sequence.layout is not None:
            self._memory.skip_cached(sequence)
        count = self._num_runnable(sequence, plan)
        if count and self._residents.grow(plan, sequence, sequence.num_computed + count):
            proposed = self._propose(plan, sequence) if self.config.speculative_tokens else ()
            plan.seats_left -= self._needs_free_seat(sequence)
            self._add_row(plan, Row.of(sequence, count, proposed))

    def _propose(self, plan: Plan, sequence: Sequence) -> list[int]:
        """Return tokens that probably follow a decoding sequence, as long as they save more time than they cost."""
        num_left = sequence.sampling.max_tokens - sequence.num_output_tokens
        limit = min(self.config.speculative_tokens, num_left - 1, plan.tokens_left - len(self.running))
        is_decoding = sequence.num_output_tokens > 0 and sequence.num_left == 1
        if limit <= 0 or not (is_decoding and sequence.is_greedy):
            return []
        # a proposed token takes as long as a token of another sequence
        seconds = work_of(1, sequence.num_computed) * self.pace.per_work
        token_seconds = self.pace.fixed / len(self.running) + seconds
        lookup = sequence.updated_lookup()
        count = num_worthwhile(lookup.hit_share, seconds / token_seconds if token_seconds else 0.0, limit)
        while count and plan.seconds + (1 + count) * seconds > plan.max_seconds:
            count -= 1
        proposed = lookup.predict(count, self._never_proposed)
        # they preempt no other sequence
        return proposed if self._residents.extend(sequence, sequence.num_computed + 1 + len(proposed)) else []

    def _try_to_admit(self, plan: Plan, sequence: Sequence) -> bool:
        """Admit a waiting sequence if it can run; return False if those after it must wait for it."""
        if not (self._has_seat(plan, sequence) and self._memory.resolve(sequence)):
            return True
        if plan.in_progress and self._memory.awaits(sequence, plan.in_progress):
            return True
        num_cached_media = self._media.num_cached(sequence.keys)
        if not self._residents.reserve(plan, sequence):
            return False  # later sequences do not overtake it: otherwise a long prompt would never get its blocks
        num_pieces = len(plan.pieces)
        count = self._num_runnable(sequence, plan)
        if count or len(plan.pieces) > num_pieces:
            self._admit(plan, sequence, num_cached_media)
            if count:
                self._add_row(plan, Row.of(sequence, count))
            plan.note_progress(sequence, self._memory.next_blocks(sequence))
        else:
            self._memory.release(sequence)
        return True

    def _has_seat(self, plan: Plan, sequence: Sequence) -> bool:
        """Return whether a sequence has a seat in this step, or may take a free one."""
        if not self._needs_free_seat(sequence):
            return True
        is_newcomer = not sequence.account.num_running
        return plan.seats_left > (0 if is_newcomer or plan.is_last_resort else plan.num_newcomer_seats)

    def _needs_free_seat(self, sequence: Sequence) -> bool:
        """Return whether a sequence waits for a seat, or shares one with another beam that runs in this step already."""
        account = sequence.account
        return account.step == self._step if account.is_search and account.num_running else sequence.is_waiting

    def _add_row(self, plan: Plan, row: Row) -> None:
        sequence, start, count, proposed = row.sequence, row.start, row.count, row.proposed
        if count == 1:
            work = num_tokens = (1 + len(proposed)) * work_of(1, start)
        else:
            # while a prompt is computed its need stays the same, so that prompts of one length take turns by age
            work, num_tokens = work_of(count, start, count if start < sequence.scored.stop else 1), count
        plan.rows.append(row)
        if sequence.layout is not None:
            for shot in self._memory.shots_within(sequence, start, start + count):
                plan.shots.setdefault(shot, sequence)
            if self.waiting:
                plan.note_progress(sequence, self._memory.blocks_of_shots(sequence, start, start + count))
        plan.tokens_left -= count + len(proposed)
        plan.work += work
        plan.seconds += work * plan.pace.per_work
        plan.may_exceed = False
        sequence.step = sequence.account.step = self._step
        self._shares.charge(sequence.account, work, num_tokens)

    def _admit(self, plan: Plan, sequence: Sequence, num_cached_media: int) -> None:
        plan.seats_left -= self._needs_free_seat(sequence)
        self.waiting.remove(sequence)
        sequence.is_waiting = False
        self._residents.begin_running(sequence)
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.queue_seconds = sequence.order.seconds_since_arrival()
            sequence.num_cached_tokens = sequence.num_computed
            sequence.num_cached_media = num_cached_media
            plan.admitted.append(sequence)

    def _serve_starved(self, plan: Plan) -> None:
        """Let the oldest sequence that lacks blocks run first, with blocks of later ones, after it has waited."""
        if (starved := self._residents.make_room()) is None:
            return
        self._note_running(plan)
        plan.is_last_resort = True
        self._fill(plan, [starved], self.pace.longest())
        plan.is_last_resort = False

    def _num_runnable(self, sequence: Sequence, plan: Plan) -> int:
        """Return how many tokens can run now: within the budgets, up to the first whose media are not available."""
        end = len(sequence.token_ids)
        if plan.shots and not plan.is_last_resort:
            end = self._memory.put_off(sequence, plan.shots)
        start, media_index = sequence.num_computed, sequence.media_index
        count = min(end - start, plan.tokens_left)
        if count > 0 and plan.max_seconds < inf:
            count = self._num_in_time(sequence, plan, count)
        if count <= 0:  # no budget, a stem, a beam that waits for other beams, or a sequence that waits for shots
            return 0
        num_frames = plan.num_frames
        for media in range(max(media_index[start], 0), media_index[start + count - 1] + 1):
            if not self._memory.hold(sequence, media, plan):
                count = min(count, max(sequence.first_token_of(media), start) - start)
                if sequence.keys[media] not in plan.unread_pages:
                    break
        if plan.num_frames > num_frames:
            work = (plan.num_frames - num_frames) * TOKENS_PER_FRAME
            self._shares.charge(sequence.account, work, work)
            # alone, since sequences that wait for pages and hold others could wait for each other
            is_alone = all(other is sequence for other in self.running)
            if is_alone and count < min(MIN_PIECE_BEFORE_MEDIA, len(sequence.token_ids) - start):
                return 0
        return count

    def _num_in_time(self, sequence: Sequence, plan: Plan, count: int) -> int:
        """Return for how many of `count` tokens there is time; none if the piece would be too small."""
        if not plan.pace.per_work:
            return count
        start = sequence.num_computed
        least = min(count, plan.pace.smallest_piece(self.config.step_seconds, start))
        work = (plan.max_seconds - plan.seconds) / plan.pace.per_work
        num_within = count_within(work, start, reads_all_logits=start < sequence.scored.stop)
        if num_within < least:
            return least if plan.may_exceed else 0
        if count <= num_within or (plan.may_exceed and count - num_within < least):
            return count
        if self._step % PROBE_EVERY == 1:  # in no step of YIELD_EVERY, whose pieces would all be halved
            num_within = max(num_within // 2, least)
        return rounded_piece(num_within)


def _in_turn(sequences: list[Sequence]) -> list[Sequence]:
    return sorted(sequences, key=attrgetter("turn"))
