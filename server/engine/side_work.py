"""Side work: vectors of media and texts, and maps of attention, which are computed between the steps of sequences.

Next to sequences, side work gets a share of the time, and without them all of it. If both media and forwards wait, each
gets half of that share. The client that has had less time comes first, then its request that has had less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf
from random import Random

from server.engine.pace import MAX_DEBT, SHARE_BESIDE, Pace
from server.engine.plan import Plan
from server.engine.shares import BY_AGE_SHARE, Account, Shares
from server.engine.tasks.task import ForwardTask, SideTask
from server.wire import Outbound

# seconds of work that a client saves up while others are served
CREDIT = 1.0


class SideWork:
    """The side tasks, their accounts, and the seconds that they may take in the next step."""

    def __init__(self, pace: Pace, clock: Callable[[], float]) -> None:
        self.tasks: dict[str, SideTask] = {}
        self._pace, self._clock = pace, clock
        self._shares = Shares(CREDIT)
        self._num_charges = 0
        self._media_seconds = 0.0  # left to media; negative after a frame of many steps' share
        self._forward_seconds = 0.0  # left to forwards, likewise
        self._is_alone = False  # sequences had neither rows nor frames in the last step
        self._random = Random(0)

    def add(self, task: SideTask, client: str) -> None:
        self.tasks[task.request_id] = task
        task.account = self._shares.open(task.request_id, client, 0, is_search=False)

    def remove(self, request_id: str) -> None:
        if self.tasks.pop(request_id, None) is not None:
            self._shares.close(request_id)

    @property
    def num_due_frames(self) -> int:
        """The frames that the next step must leave to side work, as otherwise those of sequences might never end."""
        return int(self._media_seconds > 0 and any(task.has_frames for task in self.tasks.values()))

    def plan(self, plan: Plan) -> list[bytes]:
        """Add media to the step, in turn and within their share of the time; return the sources to request."""
        if not self.tasks:
            return []
        if plan.is_of_side_work:
            plan.seconds = 0.0  # the decoder does not run
            plan.limit(self._pace.longest_of_media(), may_exceed=True)
        else:
            plan.limit(plan.seconds + self._media_seconds, may_exceed=self._media_seconds > 0)
        sources: list[bytes] = []
        for task in self._in_turn():
            num_frames = plan.num_frames
            sources += task.plan(plan)
            if num_new := plan.num_frames - num_frames:
                plan.num_side_frames += num_new
                self._charge(task.account, num_new * self._pace.per_frame)
        return sources

    def note_step(self, plan: Plan, seconds: float) -> None:
        """Let side work have its share of the time that sequences took in a step, of which it pays what it took."""
        self._is_alone = plan.is_of_side_work
        if self._is_alone:
            # debts are kept: otherwise small requests that come again and again would each meet a frame and a round
            self._media_seconds, self._forward_seconds = min(self._media_seconds, 0.0), min(self._forward_seconds, 0.0)
            return
        media, tasks = plan.side_share * seconds, self.tasks.values()
        has_both = any(task.has_frames for task in tasks) and any(map(_is_forward, tasks))
        earned = SHARE_BESIDE * (seconds - media) / (1 + has_both)
        self._media_seconds = min(_paid(self._media_seconds, media), 0.0) + earned
        self._forward_seconds = min(self._forward_seconds, 0.0) + earned

    def run(self) -> Iterator[tuple[SideTask, list[Outbound]]]:
        """Run a round of the tasks that can run, of those with a forward only of the first in turn; yield their events."""
        able = [task for task in self._in_turn() if task.can_run]
        for task in able:
            if not _is_forward(task):
                yield task, list(task.run_between_steps(lambda: True))
        forward = next(filter(_is_forward, able), None)
        if forward is not None and (self._is_alone or self._forward_seconds > 0):
            yield forward, self._run_forward(forward)

    def _run_forward(self, task: SideTask) -> list[Outbound]:
        """Run a round of a forward, and charge it before the engine closes the account of a task that has ended."""
        began = self._clock()
        end = inf if self._is_alone else began + self._forward_seconds
        events = list(task.run_between_steps(lambda: self._clock() < end))
        seconds = self._clock() - began
        self._charge(task.account, seconds)
        if not self._is_alone:
            self._forward_seconds = _paid(self._forward_seconds, seconds)
        return events

    def _in_turn(self) -> list[SideTask]:
        self._shares.compare_clients()
        age_decides = self._random.random() < BY_AGE_SHARE

        def order(task: SideTask) -> tuple[float, float, int]:
            account = task.account
            return account.client.surplus, account.age + (0.0 if age_decides else account.served), account.step

        return sorted(self.tasks.values(), key=order)

    def _charge(self, account: Account, seconds: float) -> None:
        self._num_charges += 1
        account.step = self._num_charges
        self._shares.charge(account, seconds, seconds)


def _is_forward(task: SideTask) -> bool:
    return isinstance(task, ForwardTask)


def _paid(seconds: float, taken: float) -> float:
    return max(seconds - taken, -MAX_DEBT)
