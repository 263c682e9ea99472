"""A client with scripted answers in place of an engine, and a helper that waits for a condition."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.config import FlamingoConfig
from model.prompt import EncodedPrompt
from server.engine_client.salt import SaltKind, add_salt
from server.engine_client.supervisor import State
from server.errors import InvalidRequest, ServerError
from server.grammar import GrammarError
from server.grammar.compiler import Grammars
from server.media.source import EncodedMedia
from server.served_model import ServedModel
from server.wire import (
    Admitted,
    AttentionMap,
    Event,
    Finished,
    Gates,
    Generate,
    Grammar,
    Inspect,
    Inspected,
    PromptScored,
    Score,
    Scored,
    Token,
    TokenLogprob,
)
from tests.tiny_models import CONFIGS, prompt_tokenizer

CONFIG: FlamingoConfig = CONFIGS["openflamingo"]
TOKENIZER = prompt_tokenizer(CONFIG.prompt)
EOS = TOKENIZER.id_of("</s>")
GRAMMARS = Grammars(TOKENIZER)


def served_model() -> ServedModel:
    return ServedModel("tiny", CONFIG, TOKENIZER, max_model_len=64)


class Clock:
    """A monotonic clock that tests set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def token_logprob(token_id: int, top: int | None) -> TokenLogprob | None:
    """Return log-probability -0.5 for every token; the next id is second."""
    return None if top is None else TokenLogprob(token_id, -0.5, [(token_id, -0.5), (token_id + 1, -1.5)][:top])


def unit_vector(seed: bytes, width: int) -> NDArray[np.float32]:
    """Return a random direction that depends only on the seed."""
    number = int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest(), "little")
    vector = np.random.default_rng(number).standard_normal(width)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def fake_logprobs(request: Score, candidate: list[int]) -> list[float]:
    """Return log-probabilities that depend on the last three bits of each token id and on its position."""
    return [-(token_id % 8 + 1) / 8 - position for position, token_id in enumerate(candidate)]


def compile_grammar(grammar: Grammar) -> None:
    """Raises `InvalidRequest` for a grammar that the worker would refuse."""
    try:
        GRAMMARS.compile(grammar).result()
    except GrammarError as error:
        raise InvalidRequest(f"{grammar.field}: {error}", param=grammar.field) from None


# headers of a request whose body is sent as bytes
AS_JSON = {"Content-Type": "application/json"}


class FakeClient:
    """Answers every request with the tokens of `answer`, then `</s>`; `before(index)` is awaited before each token.

    The vector of a media item is `vectors[digest]` or derived from its digest; the vector of a text likewise, with its
    token ids as a tuple. The log-probabilities of a candidate are `logprobs(request, candidate)`.
    """

    def __init__(self, answer: str = "a cat") -> None:
        self.answer = answer
        self.state: State = "ready"
        self.info: dict[str, Any] = {"device": "fake"}
        self.step_age = 0.0
        self.salt = b""
        self.salts: list[bytes] = []  # of all that was asked of this client and those made from it
        self.requests: list[Generate] = []
        self.media: list[Mapping[bytes, EncodedMedia]] = []
        self.aborted: list[str] = []
        self.num_streams_ended = 0
        self.admitted = Admitted(request_id="", queue_seconds=0.25, cached_tokens=2, media_encoded=1)
        self.before: Callable[[int], Any] | None = None
        self.proposals: Mapping[int, tuple[bool, int]] = {}  # by place in the answer: accepted, and rejected before it
        self.ended: list[tuple[str, int]] = []
        self.logprobs: Callable[[Score, list[int]], list[float]] = fake_logprobs
        self.scores: list[Score] = []
        self.inspections: list[Inspect] = []
        self.vectors: dict[bytes | tuple[int, ...], NDArray[np.float32]] = {}
        self.embedded: list[EncodedMedia] = []
        self.embedded_texts: list[list[int]] = []
        self.pinned: set[bytes] = set()
        self.pinned_prompts: list[EncodedPrompt] = []

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    def fail_all(self, error: ServerError) -> None:
        raise NotImplementedError

    def salted(self, kind: SaltKind, name: str) -> FakeClient:
        client = copy(self)
        client.salt = add_salt(self.salt, kind, name)
        return client

    async def stream(self, request: Generate, media: Mapping[bytes, EncodedMedia]) -> AsyncGenerator[Event, None]:
        if request.sampling.grammar is not None:
            compile_grammar(request.sampling.grammar)
        self.requests.append(request)
        self.salts.append(self.salt)
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
            self.num_streams_ended += 1
            if num_open:
                self.aborted.append(request.request_id)

    def end_answer(self, request_id: str, index: int) -> None:
        self.ended.append((request_id, index))

    async def score(self, request: Score, media: Mapping[bytes, EncodedMedia]) -> Scored:
        self.scores.append(request)
        self.salts.append(self.salt)
        self.media.append(media)
        return Scored(
            request_id=request.request_id,
            logprobs=[self.logprobs(request, candidate) for candidate in request.candidates],
            queue_seconds=self.admitted.queue_seconds,
            cached_tokens=self.admitted.cached_tokens,
            media_encoded=self.admitted.media_encoded,
            media_cached=self.admitted.media_cached,
        )

    async def inspect(self, request: Inspect, media: Mapping[bytes, EncodedMedia]) -> Inspected:
        """Return attention to the first visual token and the first patch only."""
        self.inspections.append(request)
        self.salts.append(self.salt)
        self.media.append(media)
        num_visual_tokens, side = CONFIG.resampler.num_latents, 2
        tokens = [1.0, *[0.0] * (num_visual_tokens - 1)]
        grid = np.zeros((1, side, side), np.float32)
        grid[0, 0, 0] = 1
        layers = [[layer] for layer in request.layers] or [list(CONFIG.gated_layers)]
        maps = [
            AttentionMap(layers=group, visual_tokens=tokens, shape=(1, 2, 2), data=grid.tobytes()) for group in layers
        ]
        return Inspected(
            request_id=request.request_id,
            gates=[Gates(layer=layer, attention=0.5, feed_forward=-0.25) for layer in CONFIG.gated_layers],
            maps=maps if request.prompt.media_index[request.token] >= 0 else [],
        )

    async def embed(self, media: Sequence[EncodedMedia]) -> NDArray[np.float32]:
        self.embedded += media
        self.salts.append(self.salt)
        width = CONFIG.vision.feature_dim
        rows = [self.vectors.get(m.digest, unit_vector(m.digest, width)) for m in media]
        return np.stack(rows) if rows else np.zeros((0, width), np.float32)

    async def embed_text(self, texts: Sequence[list[int]]) -> NDArray[np.float32]:
        self.embedded_texts += texts
        width = CONFIG.language_model.dim
        rows = [self.vectors.get(tuple(ids), unit_vector(repr(ids).encode(), width)) for ids in texts]
        return np.stack(rows) if rows else np.zeros((0, width), np.float32)

    def pin(self, digests: Sequence[bytes], is_kept: bool, prompts: Sequence[EncodedPrompt] = ()) -> None:
        self.pinned = self.pinned | set(digests) if is_kept else self.pinned - set(digests)
        pinned = [prompt for prompt in self.pinned_prompts if prompt not in prompts]
        self.pinned_prompts = [*pinned, *prompts] if is_kept else pinned

    async def _events(self, request: Generate) -> AsyncGenerator[Event, None]:
        sampling = request.sampling
        yield self.admitted
        if sampling.prompt_logprobs is not None:
            scores = [token_logprob(i, sampling.prompt_logprobs) for i in request.prompt.token_ids]
            yield PromptScored(request_id="", logprobs=[None, *scores[1:]])
        if sampling.max_tokens == 0:
            for index in range(sampling.n):
                yield Finished(request_id="", index=index, finish_reason="length")
            return
        ids = [*TOKENIZER.encode_plain(self.answer), EOS][: sampling.max_tokens]
        for position, token_id in enumerate(ids):
            if self.before is not None:
                await self.before(position)
            is_proposed, num_rejected = self.proposals.get(position, (False, 0))
            last = "stop" if token_id == EOS else "length" if position + 1 == len(ids) else None
            for index in range(sampling.n):
                yield Token(
                    request_id="",
                    token_id=token_id,
                    index=index,
                    logprob=token_logprob(token_id, sampling.logprobs),
                    finish_reason=last,  # type: ignore[arg-type]
                    is_proposed=is_proposed,
                    num_rejected=num_rejected,
                )


async def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until a condition that another process or task fulfils; fail after `seconds`."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.01)
    assert condition(), f"the condition is still false after {seconds} seconds"
