"""A simulated replica: one engine that runs steps of decoding rows, pieces of prompts, and images.

A step is a simplified version of the engine's scheduler: every decoding sequence gets its token; then prompts, small needs
first, add images and tokens until the time limit of the step. Steps in which sequences only decode have the same cost until
one of them ends or a request arrives, so they are simulated as one event, which does not change the result.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from simpy import Environment, Event, Interrupt

from bench.fleet.caches import Caches, Misses
from bench.fleet.costs import Costs
from bench.fleet.processors import Processors
from server.engine.pace import LONE_SECONDS, LONE_STEPS, MIN_PIECE
from server.engine.shares import TOKENS_PER_FRAME, WORK_PER_TOKEN_OF_AGE

# constants of the engine: config.py in server/engine
MAX_FRAMES, MAX_FRAMES_IDLE = 2, 16

Steps = Generator[Event, Any, None]


@dataclass(slots=True, eq=False)
class Request:
    """A request and its progress; `misses` counts what the replica had to compute for its support set."""

    number: int
    support_set: int
    arrived: float
    replica: int = -1
    misses: Misses | None = None
    first_token: float = -1.0
    finished: float = -1.0
    num_retries: int = 0
    # what is left to do
    images: int = 0
    pages: int = 0
    tokens: int = 0
    new_tokens: int = 0
    age: float = 0.0
    waits_for: Request | None = None  # that computes the same support set

    @property
    def need(self) -> float:
        return self.age + self.tokens + self.new_tokens + TOKENS_PER_FRAME * self.images

    @property
    def is_blocked(self) -> bool:
        return self.waits_for is not None and self.waits_for.first_token < 0

    @property
    def is_computed(self) -> bool:
        return not (self.images or self.pages or self.tokens)


@dataclass(slots=True)
class Step:
    """The work of a step: rows that decode, and counts of images, pages and tokens of prompts."""

    rows: int
    images: int = 0
    pages: int = 0
    tokens: int = 0

    def seconds(self, costs: Costs) -> float:
        return costs.media(self.images, self.pages) + costs.forward(self.rows, self.tokens)


@dataclass(slots=True, eq=False)
class Replica:
    """An engine with its caches. `handle_finish` is called with each request that ends.

    With `in_jumps`, equal steps are one event; it has to be false on shared processors, where their time varies.
    """

    environment: Environment
    costs: Costs
    caches: Caches
    processors: Processors
    handle_finish: Callable[[Request], None]
    step_seconds: float
    in_jumps: bool = True
    prompts: list[Request] = field(default_factory=list)
    rows: list[Request] = field(default_factory=list)
    busy: float = 0.0
    _work: float = 0.0
    _met: float = -LONE_SECONDS
    _computing: dict[int, Request] = field(default_factory=dict)  # the requests that compute a support set
    _wait: Event | None = None
    _is_jumping: bool = False
    _process: Any = None

    def start(self) -> None:
        self._process = self.environment.process(self._run())

    def submit(self, request: Request) -> None:
        """Queue a request, and look up its support set in the caches."""
        shape, misses = self.caches.shape, self.caches.use(request.support_set, request.number)
        request.misses = misses
        request.images, request.pages = misses.encoded + 1, misses.rebuilt
        request.tokens, request.new_tokens = misses.tokens + shape.query_tokens, shape.new_tokens
        request.age = self._work / WORK_PER_TOKEN_OF_AGE
        other = self._computing.get(request.support_set)
        request.waits_for = other if other is not None and other.first_token < 0 else None
        if misses.tokens:
            self._computing[request.support_set] = request
        if self.prompts or self.rows:
            self._met = self.environment.now
        self.prompts.append(request)
        self._wake()

    def stop(self) -> list[Request]:
        """End the process, and return the requests that it has lost."""
        lost = self.prompts + self.rows
        self.prompts, self.rows, self._wait = [], [], None
        self._is_jumping = False
        self._computing.clear()
        self.caches.clear()
        if self._process is not None and self._process.is_alive:
            self._process.interrupt(cause=True)
        self._process = None
        return lost

    def _wake(self) -> None:
        if self._wait is not None:
            self._wait.succeed()
            self._wait = None
        elif self._is_jumping:
            self._is_jumping = False
            self._process.interrupt(cause=False)

    def _run(self) -> Steps:
        try:
            while True:
                if not self.prompts and not self.rows:
                    self._wait = self.environment.event()
                    yield self._wait
                elif self.prompts or not self.in_jumps:
                    yield from self._run_step()
                else:
                    yield from self._jump()
        except Interrupt:
            return  # it was stopped

    def _run_step(self) -> Steps:
        step, decoding = Step(len(self.rows)), list(self.rows)
        self._fill(step)
        seconds = step.seconds(self.costs)
        yield self.processors.compute(seconds)
        self.busy += seconds
        self._decode(decoding, 1)
        self._begin_decoding()

    def _jump(self) -> Steps:
        """Run equal steps until a sequence ends, or until the end of the step in which a request comes."""
        seconds, began = self.costs.forward(len(self.rows), 0), self.environment.now
        count = min(request.new_tokens for request in self.rows)
        self._is_jumping = True
        try:
            yield self.processors.compute(count * seconds)
        except Interrupt as interrupt:
            if interrupt.cause:
                raise
            passed = (self.environment.now - began) / seconds if seconds else count
            count = min(max(ceil(passed), 1), count)
            yield self.processors.compute(max(began + count * seconds - self.environment.now, 0.0))
        self._is_jumping = False
        self.busy += count * seconds
        self._decode(list(self.rows), count)

    def _fill(self, step: Step) -> None:
        """Add pieces of prompts to a step, and take them off what is left of the prompts."""
        is_lone = self.environment.now - self._met >= LONE_SECONDS
        limit = self.step_seconds * (LONE_STEPS if is_lone else 1)
        for request in sorted(self.prompts, key=lambda request: request.need):
            if request.is_blocked:
                continue
            is_first = not (step.images or step.pages or step.tokens)
            left = limit - step.seconds(self.costs)
            if not is_first and left <= 0:
                return
            self._add_media(step, request, left, is_first)
            if not request.images and not request.pages:
                self._add_tokens(step, request, limit - step.seconds(self.costs), is_first)

    def _add_media(self, step: Step, request: Request, left: float, is_first: bool) -> None:
        most = (MAX_FRAMES if step.rows or step.tokens else MAX_FRAMES_IDLE) - step.images
        in_time = int(left / self.costs.per_image) if self.costs.per_image else most
        count = min(max(min(most, in_time), int(is_first)), request.images)
        if count > 0:
            step.images += count
            request.images -= count
            self._work += count * TOKENS_PER_FRAME
        if not request.images:
            step.pages += request.pages
            request.pages = 0

    def _add_tokens(self, step: Step, request: Request, left: float, is_first: bool) -> None:
        in_time = int(left / self.costs.per_token) if self.costs.per_token else request.tokens
        count = min(max(in_time, MIN_PIECE if is_first else 0), request.tokens)
        if count < min(MIN_PIECE, request.tokens):
            return
        step.tokens += count
        request.tokens -= count
        self._work += count

    def _decode(self, rows: list[Request], count: int) -> None:
        now = self.environment.now
        self._work += count * len(rows)
        for request in rows:
            request.new_tokens -= count
        if any(not request.new_tokens for request in rows):
            self._finish([request for request in rows if not request.new_tokens], now)

    def _begin_decoding(self) -> None:
        """Give prompts that are computed their first token."""
        now = self.environment.now
        computed = [request for request in self.prompts if request.is_computed]
        if not computed:
            return
        self.prompts = [request for request in self.prompts if not request.is_computed]
        self.rows += computed
        for request in computed:
            request.first_token = now
            request.new_tokens -= 1
            if self._computing.get(request.support_set) is request:
                del self._computing[request.support_set]
        self._finish([request for request in computed if not request.new_tokens], now)

    def _finish(self, requests: list[Request], now: float) -> None:
        for request in requests:
            request.finished = now
            self.rows.remove(request)
            self.handle_finish(request)
