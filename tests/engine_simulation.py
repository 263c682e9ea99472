"""An engine in simulated time: its runner computes nothing, and the clock advances by what a step would cost."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from model.prompt import EncodedPrompt
from server.engine.caches.media import MediaCache
from server.engine.config import EngineConfig
from server.engine.device.runner import Launched, Runner
from server.engine.device.sampler import Reading, Result, logit_positions, num_candidates
from server.engine.device.transfers import Downloads
from server.engine.engine import Engine
from server.engine.plan import Plan, Row
from server.wire import (
    Abort,
    Embed,
    Embedded,
    Finished,
    Generate,
    MediaPixels,
    MediaWanted,
    Request,
    Sampling,
    Score,
    Scored,
    Token,
)
from tests.engine_client import IMAGE_TOKEN, SERVED
from tests.tiny_models import prompt_tokenizer

TOKEN_ID = 5


@dataclass(frozen=True)
class Costs:
    """Seconds of a step, per step, token, thousand tokens of context that a row reads, row of logits, and frame."""

    step: float = 0.008
    token: float = 0.001
    context: float = 0.004
    logits: float = 0.0003
    frame: float = 0.018

    def of(self, plan: Plan) -> float:
        return (
            (self.step if plan.rows else 0.0)
            + sum(self._of_row(row) for row in plan.rows)
            + self.frame * plan.num_frames
        )

    def _of_row(self, row: Row) -> float:
        count = row.end - row.start
        context = row.start / 1000 * self.context * (1 + count / 16)
        return count * self.token + context + self.logits * len(logit_positions(row))


class SimulatedRunner(Runner):
    """A runner that returns tokens by their number in the answer, and candidates and log-probabilities where wanted."""

    media: MediaCache

    def __init__(self, costs: Costs, token_at: Callable[[int], int] = lambda number: TOKEN_ID) -> None:
        self.costs = costs
        self.token_at = token_at
        self.now = 0.0
        self.plans: list[Plan] = []

    def launch(self, plan: Plan, before: Launched | None = None) -> Launched:
        self.now += self.costs.of(plan)
        self.plans.append(plan)
        for piece in plan.pieces:
            if piece.count and piece.has_last_frame:
                self.media.pooled.put(piece.encoding.key, np.zeros(1, np.float32))
        reading = Reading(list(map(self._results, plan.rows)), Downloads(), torch.empty(0))
        return Launched(plan, Downloads(), reading, set())

    def _results(self, row: Row) -> list[Result]:
        """Return the result of a row's own tokens, and one for each proposed token."""
        first = row.sequence.num_output_tokens
        later = range(1, 1 + len(row.proposed))
        return [self._result(row), *(Result(row, number, self.token_at(first + number)) for number in later)]

    def _result(self, row: Row) -> Result:
        sequence = row.sequence
        end = row.start + row.count
        if sequence.targets:
            positions = range(row.start, end)
            targets = {position: ids for position, ids in sequence.targets.items() if position in positions}
            return Result(row, target_logprobs={position: [0.0] * len(ids) for position, ids in targets.items()})
        result = Result(row, token_id=self.token_at(sequence.num_output_tokens) if row.samples else None)
        if width := sequence.sampling.beam_width:
            result.candidates = [(TOKEN_ID + i, -1.0 - i) for i in range(num_candidates(width))]
        return result


@dataclass
class Simulation:
    """Requests at an engine, with the times of their arrival, their tokens and their end."""

    config: EngineConfig
    costs: Costs = field(default_factory=Costs)
    arrived: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    token_times: dict[str, list[float]] = field(default_factory=dict)
    num_frames: dict[bytes, int] = field(default_factory=dict)  # by media digest
    num_requests: int = 0
    token_at: Callable[[int], int] = lambda number: TOKEN_ID

    def __post_init__(self) -> None:
        self.runner = SimulatedRunner(self.costs, self.token_at)
        tiny = EngineConfig(num_blocks=128, num_media_slots=1, max_sequences=1)
        self.engine = Engine(SERVED["openflamingo"], prompt_tokenizer(), tiny)
        self.engine = Engine(
            SERVED["openflamingo"], prompt_tokenizer(), self.config, salt=b"test", clock=lambda: self.runner.now
        )
        self.engine.runner, self.runner.media = self.runner, self.engine.media
        self._learn()

    @property
    def now(self) -> float:
        return self.runner.now

    def _learn(self) -> None:
        """Let the engine measure its steps, as it does before it is ready."""
        for _ in range(4):
            self.run(self.generate(200, max_tokens=4))
            self.run(self.generate(20, max_tokens=4, num_images=1))

    def generate(
        self,
        num_tokens: int,
        max_tokens: int = 4,
        num_images: int = 0,
        client: str = "",
        priority: int = 0,
        num_frames: int = 1,
        **sampling: int,
    ) -> str:
        """Add a request with a prompt of its own; its images are videos if they have several frames."""
        fields = self._prompt(num_tokens, num_images)
        self.num_frames.update(dict.fromkeys(fields.media, num_frames))
        sampled = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **sampling)  # type: ignore[arg-type]
        return self.add(
            Generate(request_id=self._name(), prompt=fields, sampling=sampled, client=client, priority=priority)
        )

    def score(self, num_tokens: int, candidates: Sequence[int], client: str = "") -> str:
        """Add a request that scores candidates of these lengths."""
        prompt = self._prompt(num_tokens, 0)
        lists = [[i % 200 + 1] * length for i, length in enumerate(candidates)]
        return self.add(Score(request_id=self._name(), prompt=prompt, candidates=lists, client=client))

    def embed(self, num_images: int, client: str = "", num_frames: int = 1) -> str:
        """Add a request for the vectors of new images, which are videos if they have several frames."""
        media = self._prompt(6, num_images).media
        self.num_frames.update(dict.fromkeys(media, num_frames))
        return self.add(Embed(request_id=self._name(), media=media, client=client))

    def add(self, request: Request) -> str:
        self.arrived[request.request_id] = self.now
        self.engine.add(request)
        return request.request_id

    def _name(self) -> str:
        self.num_requests += 1
        return str(self.num_requests)

    def _prompt(self, num_tokens: int, num_images: int) -> EncodedPrompt:
        """Return a prompt that begins with its number, followed by images with a few tokens each."""
        head = [int(digit) for digit in f"{self.num_requests:06}"]
        token_ids, media_index, media = head + [1] * (num_tokens - len(head)), [-1] * num_tokens, []
        for image in range(num_images):
            media.append(hashlib.blake2b(f"{self.num_requests} {image}".encode(), digest_size=32).digest())
            token_ids += [IMAGE_TOKEN, 2, 3, 4]
            media_index += [image] * 4
        return EncodedPrompt(token_ids=token_ids, media_index=media_index, media=media)

    def step(self) -> None:
        began = self.now
        for event in self.engine.step():
            match event:
                case MediaWanted(digest):
                    num_frames = self.num_frames[digest]
                    data = digest * 6 * num_frames
                    self.engine.supply(MediaPixels(digest=digest, shape=(num_frames, 8, 8, 3), data=data))
                case Token():
                    self.token_times.setdefault(event.request_id, []).append(self.now)
                    if event.finish_reason is not None:
                        self.ended[event.request_id] = self.now
                case Finished() | Scored() | Embedded():
                    self.ended[event.request_id] = self.now
        if self.now == began:
            self.runner.now += 0.0001

    def run(self, request_id: str, max_steps: int = 20_000) -> float:
        """Step until a request has ended; return its seconds since its arrival."""
        for _ in range(max_steps):
            if request_id in self.ended:
                return self.ended[request_id] - self.arrived[request_id]
            self.step()
        raise AssertionError(f"request {request_id} has not ended after {max_steps} steps")

    def run_until(self, time: float) -> None:
        """Step until a time, or until there is no work; a step that has begun then ends later."""
        while self.now < time and self.engine.has_work():
            self.step()
        self.runner.now = max(self.now, time)

    def arrive(self, time: float, num_images: int = 0, client: str = "") -> float:
        """Let a small request arrive at a time, perhaps in the middle of a step; return its seconds."""
        self.run_until(time)
        request_id = self.generate(20, max_tokens=4, num_images=num_images, client=client)
        self.arrived[request_id] = time
        return self.run(request_id)

    def abort(self, request_id: str) -> None:
        self.engine.abort(Abort(request_id))
