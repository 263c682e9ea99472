"""Requests to a scripted worker: media by name, streams, scores, and a decoder that records what it decodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from model.prompt import EncodedPrompt
from server.engine_client.client import WorkerClient
from server.media.decoder import Frames
from server.media.source import EncodedMedia
from server.media.turns import DecodeTurns, Job, Requester
from server.wire import Event, Generate, Sampling, Score, Token
from tests.server.fakes import TOKENIZER

FRAME = Frames(shape=(1, 2, 2, 3), data=bytes(12))


class FakeDecoder:
    """Decodes any media to one frame, or raises `error`; while `opened` is cleared, it waits."""

    def __init__(self) -> None:
        self.decoded: list[bytes] = []
        self.cancelled: list[bytes] = []
        self.opened = asyncio.Event()
        self.opened.set()
        self.error: Exception | None = None
        self.turns = DecodeTurns(range(64))

    async def decode(self, media: EncodedMedia, job: Job | None = None) -> Frames:
        turn = await self.turns.take(job or Job(Requester()))
        try:
            self.decoded.append(media.data)
            await self.opened.wait()
        except asyncio.CancelledError:
            self.cancelled.append(media.data)
            raise
        finally:
            self.turns.give_back(turn)
        if self.error is not None:
            raise self.error
        return FRAME

    async def stop(self) -> None:
        pass


def image(name: str) -> EncodedMedia:
    data = name.encode()
    return EncodedMedia(kind="image", source=data, num_bytes=len(data), digest=data.ljust(32), param=f"prompt[{name}]")


def text_prompt(text: str, *media: EncodedMedia) -> EncodedPrompt:
    token_ids = TOKENIZER.encode_plain(text)
    digests = [item.digest for item in media]
    return EncodedPrompt(token_ids=token_ids, media_index=[-1] * len(token_ids), media=digests)


def stream(
    engine: WorkerClient, request_id: str, *media: EncodedMedia, text: str = "abc", script: int | None = None
) -> AsyncGenerator[Event, None]:
    sampling = Sampling(max_tokens=10**6, seed=script)
    request = Generate(request_id=request_id, prompt=text_prompt(text, *media), sampling=sampling)
    return engine.stream(request, {item.digest: item for item in media})


async def read_tokens(events: AsyncGenerator[Event, None], count: int) -> list[int]:
    """Return the first `count` tokens, then close the stream."""
    token_ids: list[int] = []
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Token):
                token_ids.append(event.token_id)
            if len(token_ids) == count:
                return token_ids
    raise AssertionError(f"the stream ended after {len(token_ids)} tokens")


def score(request_id: str, *media: EncodedMedia) -> Score:
    return Score(request_id=request_id, prompt=text_prompt("abc", *media), candidates=[[1, 2], [3]], priority=1)
