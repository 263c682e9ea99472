"""The other end of the engine's wire, for tests: prompts, a client that supplies media, and assertions on its answers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from model.config import AlonePositions
from model.flamingo import Flamingo
from model.inference import InferenceModel, prepare_for_inference
from model.prompt import EncodedPrompt, ShotsAttend
from model.reference import generate
from model.vision import normalise
from server.engine.config import EngineConfig
from server.engine.device.runner import Launched
from server.engine.engine import Engine
from server.engine.plan import Plan
from server.wire import (
    Admitted,
    Embedded,
    Finished,
    Generate,
    Inspected,
    MediaPixels,
    MediaWanted,
    Outbound,
    PromptScored,
    Sampling,
    Scored,
    Token,
)
from tests.tiny_models import CONFIGS, FAMILIES, Family, prompt_tokenizer, tiny_model, with_alone_positions

CONFIG = EngineConfig(
    block_size=4,
    num_blocks=64,
    num_media_slots=8,
    max_sequences=8,
    max_tokens_per_step=24,
    max_frames_per_step=2,
    max_frames_idle=4,
    max_model_len=128,
)
IMAGE_TOKEN = 257
# two of each: those of the reference stay as they were built, with gates of their own
MODELS = {family: tiny_model(CONFIGS[family]) for family in FAMILIES}
SERVED = {family: prepare_for_inference(tiny_model(CONFIGS[family])) for family in FAMILIES}
GREEDY = Sampling(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=0)


@cache
def reference_model(family: Family, alone_positions: AlonePositions) -> Flamingo:
    """Return the model in float64, so that the engine's rounding alone counts against a tolerance."""
    return tiny_model(with_alone_positions(CONFIGS[family], alone_positions)).double()


@cache
def served_model(family: Family, alone_positions: AlonePositions, dtype: torch.dtype = torch.float32) -> InferenceModel:
    if alone_positions == "restart" and dtype == torch.float32:
        return SERVED[family]
    return prepare_for_inference(tiny_model(with_alone_positions(CONFIGS[family], alone_positions)).to(dtype))


def frames(image: int, num_frames: int = 0) -> np.ndarray:
    """Return the frames of an image or video; number 5 is a video."""
    num_frames = num_frames or (7 if image == 5 else 1)
    return np.random.default_rng(image).integers(0, 256, (num_frames, 8, 8, 3), dtype=np.uint8)


def source(image: int, encoding: int = 0) -> bytes:
    """Return the digest of one of several encodings of an image."""
    return hashlib.blake2b(bytes([image, encoding]), digest_size=32).digest()


@dataclass
class Client:
    """Supplies requested media and collects events and replies."""

    engine: Engine
    images: dict[bytes, np.ndarray]
    tokens: dict[str, list[Token]] = field(default_factory=dict)
    scores: dict[str, PromptScored] = field(default_factory=dict)
    finished: dict[str, Finished] = field(default_factory=dict)
    admitted: dict[str, Admitted] = field(default_factory=dict)
    scored: dict[str, Scored] = field(default_factory=dict)
    embedded: dict[str, np.ndarray] = field(default_factory=dict)
    embedded_counts: dict[str, tuple[int, int]] = field(default_factory=dict)  # of media: encoded, cached
    inspected: dict[str, Inspected] = field(default_factory=dict)
    requested: list[bytes] = field(default_factory=list)

    def step(self) -> None:
        for event in self.engine.step():
            self.take(event)

    def take(self, event: Outbound) -> None:
        match event:
            case MediaWanted(digest):
                self.requested.append(digest)
                image = self.images[digest]
                shape = tuple(int(n) for n in image.shape)
                assert len(shape) == 4
                self.engine.supply(MediaPixels(digest=digest, shape=shape, data=image.tobytes()))
            case Token():
                self.tokens.setdefault(event.request_id, []).append(event)
            case PromptScored():
                self.scores[event.request_id] = event
            case Finished():
                self.finished[event.request_id] = event
            case Admitted():
                self.admitted[event.request_id] = event
            case Scored():
                self.scored[event.request_id] = event
            case Embedded():
                self.embedded[event.request_id] = np.frombuffer(event.data, np.float32).reshape(event.shape)
                self.embedded_counts[event.request_id] = (event.media_encoded, event.media_cached)
            case Inspected():
                self.inspected[event.request_id] = event

    def run(self, max_steps: int = 500) -> None:
        for _ in range(max_steps):
            if not self.engine.has_work():
                return
            self.step()
        raise AssertionError(f"the engine still has work after {max_steps} steps")

    def ids(self, request_id: str) -> list[int]:
        return [token.token_id for token in self.tokens.get(request_id, [])]


@dataclass(frozen=True)
class Prompt:
    """Shots of (image, text length); without an image, -1. Unless `step` is 0, a text depends on its place."""

    shots: tuple[tuple[int, int], ...]
    max_tokens: int = 6
    shots_attend: ShotsAttend = "previous"
    step: int = 31

    def request(self, request_id: str, sampling: Sampling = GREEDY, encoding: int = 0) -> Generate:
        token_ids, media_index, media = [], [], []
        for shot, (image, length) in enumerate(self.shots):
            if image >= 0:
                media.append(source(image, encoding))
                token_ids.append(IMAGE_TOKEN)
                media_index.append(len(media) - 1)
            for i in range(length):
                token_ids.append((self.step * shot + 7 * i + 3 * image) % 256)
                media_index.append(len(media) - 1)
        return Generate(
            request_id=request_id,
            prompt=EncodedPrompt(
                token_ids=token_ids,
                media_index=media_index,
                media=media,
                shots_attend=self.shots_attend,
            ),
            sampling=sampling,
        )

    def pixels(self, model: Flamingo) -> list[Tensor]:
        dtype = next(model.parameters()).dtype
        media = [torch.from_numpy(frames(p)) for p, _ in self.shots if p >= 0]
        return [normalise(frames, model.config.vision).to(dtype) for frames in media]


IMAGES = {source(p, e): frames(p) for p in range(6) for e in range(2)}


def client(
    family: Family,
    config: EngineConfig = CONFIG,
    alone_positions: AlonePositions = "restart",
    clock: Callable[[], float] = time.perf_counter,
    dtype: torch.dtype = torch.float32,
) -> Client:
    model = served_model(family, alone_positions, dtype)
    return Client(Engine(model, prompt_tokenizer(), config, salt=b"test", clock=clock), dict(IMAGES))


def client_with_long_steps(monkeypatch: pytest.MonkeyPatch, config: EngineConfig) -> Client:
    """Return a client whose engine's clock moves with its steps alone: what runs between steps takes no time."""
    launches: list[Plan] = []
    answer = client("flamingo", config, clock=lambda: len(launches))
    launch = answer.engine.runner.launch

    def counted(plan: Plan, before: Launched | None = None) -> Launched:
        launches.append(plan)
        return launch(plan, before)

    monkeypatch.setattr(answer.engine.runner, "launch", counted)
    return answer


def assert_equals_reference(
    family: Family,
    prompt: Prompt,
    answer: Client,
    request_id: str,
    num_tokens: int = GREEDY.max_tokens,
    tolerance: float = 1e-4,
) -> None:
    alone_positions = answer.engine.runner.model.config.language_model.alone_positions
    model, request = reference_model(family, alone_positions), prompt.request(request_id)
    tokens = answer.tokens[request_id]
    assert len(tokens) == num_tokens
    expected = generate(
        model,
        request.prompt.token_ids,
        request.prompt.media_index,
        prompt.pixels(model),
        max_tokens=num_tokens,
        suppressed_ids=[IMAGE_TOKEN],
        span_starts=request.prompt.span_starts if request.prompt.has_spans else (),
    )
    assert [t.token_id for t in tokens] == expected.token_ids
    logprobs = [t.logprob.logprob for t in tokens if t.logprob is not None]
    assert logprobs == pytest.approx(expected.logprobs, abs=tolerance)


def assert_all_released(engine: Engine) -> None:
    assert engine.blocks.num_available == engine.blocks.num_blocks
    assert engine.media.slots.num_available == engine.media.slots.num_slots
    assert engine.media.slots.num_in_use == 0
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    assert not engine.media._encodings
    assert not engine.has_work()


FEW_SHOT = Prompt(((-1, 3), (0, 5), (1, 4), (2, 9), (3, 2)))
