"""A client that tells a story in place of an engine, and waiting for what somebody else brings about."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from typing import Any

from model.config import FlamingoConfig
from server.engine.client import Event, State
from server.engine.wire import (
    Admitted,
    Finished,
    Generate,
    PromptScored,
    Token,
    TokenLogprob,
)
from server.errors import ServerError
from server.media.source import EncodedMedia
from server.served_model import ServedModel
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
        num_open = request.sampling.n
        try:
            async for event in self._events(request):
                num_open -= isinstance(event, Token | Finished) and event.finish_reason is not None
                yield event
        except ServerError:
            num_open = 0
            raise
        finally:
            if num_open:
                self.aborted.append(request.request_id)

    async def _events(self, request: Generate) -> AsyncGenerator[Event, None]:
        sampling = request.sampling
        yield self.admitted
        if sampling.prompt_logprobs is not None:
            scores = [scored(i, sampling.prompt_logprobs) for i in request.token_ids]
            yield PromptScored(request_id="", logprobs=[None, *scores[1:]])
        if sampling.max_tokens == 0:
            for index in range(sampling.n):
                yield Finished(request_id="", index=index, finish_reason="length")
            return
        ids = [*TOKENIZER.encode_plain(self.answer), EOS][: sampling.max_tokens]
        for place, token_id in enumerate(ids):
            if self.before is not None:
                await self.before(place)
            last = "stop" if token_id == EOS else "length" if place + 1 == len(ids) else None
            for index in range(sampling.n):
                yield Token(
                    request_id="",
                    token_id=token_id,
                    index=index,
                    logprob=scored(token_id, sampling.logprobs),
                    finish_reason=last,  # type: ignore[arg-type]
                )


async def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for what another process or task brings about; fails by name when it does not."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.01)
    assert condition(), f"did not happen within {seconds} seconds"
