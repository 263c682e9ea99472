"""Engines that tell a story instead of computing: one in place of the client, one that a real worker process runs."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from typing import Any

from model.config import FlamingoConfig
from server.engine.client import Event, State
from server.engine.wire import (
    Admitted,
    Finished,
    Generate,
    MediaFailed,
    MediaPixels,
    MediaWanted,
    Outbound,
    PromptScored,
    Token,
    TokenLogprob,
)
from server.errors import ServerError
from server.media.source import EncodedMedia
from server.served_model import ServedModel
from server.settings import Settings
from tests.tiny_models import CONFIGS, prompt_tokenizer

CONFIG: FlamingoConfig = CONFIGS["openflamingo"]
TOKENIZER = prompt_tokenizer(CONFIG.prompt)
EOS = TOKENIZER.id_of("</s>")


def served_model() -> ServedModel:
    return ServedModel("tiny", CONFIG, TOKENIZER, max_model_len=64)


def scored(token_id: int, top: int | None) -> TokenLogprob | None:
    """Log-probability -0.5 for every token; the runner-up is the next id."""
    return None if top is None else TokenLogprob(token_id, -0.5, [(token_id, -0.5), (token_id + 1, -1.5)][:top])


class FakeClient:
    """Answers every request with the tokens of `answer`, then `</s>`; `before` runs ahead of each token."""

    def __init__(self, answer: str = "a cat") -> None:
        self.answer = answer
        self.state: State = "ready"
        self.info: dict[str, Any] = {"device": "fake"}
        self.step_age = 0.0
        self.requests: list[Generate] = []
        self.media: list[Mapping[bytes, EncodedMedia]] = []
        self.aborted: list[str] = []
        self.admitted = Admitted(request_id="", queue_seconds=0.25, cached_tokens=2, media_encoded=1)
        self.before: Callable[[int], Any] | None = None

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    def fail_all(self, error: ServerError) -> None:
        raise NotImplementedError

    async def stream(self, request: Generate, media: Mapping[bytes, EncodedMedia]) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        self.media.append(media)
        is_open = True
        try:
            async for event in self._events(request):
                is_open = not isinstance(event, Token | Finished) or event.finish_reason is None
                yield event
        except ServerError:
            is_open = False
            raise
        finally:
            if is_open:
                self.aborted.append(request.request_id)

    async def _events(self, request: Generate) -> AsyncGenerator[Event, None]:
        sampling = request.sampling
        yield self.admitted
        if sampling.prompt_logprobs is not None:
            scores = [scored(i, sampling.prompt_logprobs) for i in request.token_ids]
            yield PromptScored(request_id="", logprobs=[None, *scores[1:]])
        if sampling.max_tokens == 0:
            yield Finished(request_id="", finish_reason="length")
            return
        ids = [*TOKENIZER.encode_plain(self.answer), EOS][: sampling.max_tokens]
        for place, token_id in enumerate(ids):
            if self.before is not None:
                await self.before(place)
            last = "stop" if token_id == EOS else "length" if place + 1 == len(ids) else None
            yield Token(
                request_id="",
                token_id=token_id,
                logprob=scored(token_id, sampling.logprobs),
                finish_reason=last,  # type: ignore[arg-type]
            )


class ToldEngine:
    """Runs in a worker. Repeats the prompt, a token a step, for ever, once it holds the media that the prompt shows.

    A prompt that begins with `!` is an order: `!kill` ends the process, `!raise` makes the step fail, `!sleep` hangs.
    """

    def __init__(self) -> None:
        self.requests: dict[str, deque[int]] = {}
        self.waiting: dict[str, Generate] = {}
        self.held: set[bytes] = set()
        self.events: list[Outbound] = []
        self.num_aborted = 0

    def add(self, request: Generate) -> None:
        self.waiting[request.request_id] = request
        self.events += [MediaWanted(digest) for digest in request.media if digest not in self.held]

    def abort(self, request_id: str) -> None:
        self.num_aborted += 1
        self.waiting.pop(request_id, None)
        self.requests.pop(request_id, None)

    def supply(self, media: MediaPixels) -> None:
        assert len(media.data) == media.shape[0] * media.shape[1] * media.shape[2] * media.shape[3]
        self.held.add(media.digest)

    def fail_media(self, failure: MediaFailed) -> None:
        for name, request in list(self.waiting.items()):
            if failure.digest in request.media:
                del self.waiting[name]
                self.events.append(Finished(request_id=name, finish_reason="error", error=failure.message))

    def has_work(self) -> bool:
        return bool(self.requests or self.waiting or self.events)

    def is_waiting_for_media(self) -> bool:
        return bool(self.waiting) and not self.requests and not self.events

    def gauges(self) -> dict[str, float]:
        return {"num_preemptions": float(self.num_aborted), "media_slots_in_use": float(len(self.held))}

    def step(self) -> list[Outbound]:
        for name, request in list(self.waiting.items()):
            if self.held.issuperset(request.media):
                del self.waiting[name]
                _obey(TOKENIZER.decode(request.token_ids))
                self.requests[name] = deque(request.token_ids)
                self.events.append(Admitted(request_id=name, queue_seconds=0.0, media_encoded=len(request.media)))
        for name, ids in self.requests.items():
            ids.rotate(-1)
            self.events.append(Token(request_id=name, token_id=ids[-1]))
        time.sleep(0.002)
        events, self.events = self.events, []
        return events


def _obey(prompt: str) -> None:
    match prompt.split(" ")[0]:
        case "!kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "!raise":
            raise RuntimeError("told to")
        case "!sleep":
            time.sleep(600)


def build(settings: Settings) -> tuple[ToldEngine, dict[str, Any]]:
    return ToldEngine(), {"device": "told"}


def build_fails(settings: Settings) -> tuple[ToldEngine, dict[str, Any]]:
    raise RuntimeError("no such weights")


async def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for what another process or task brings about; fails by name when it does not."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.01)
    assert condition(), f"did not happen within {seconds} seconds"
