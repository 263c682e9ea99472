"""Few-shot requests that share their support sets, as a server meets them: made from seeds, the same on every machine.

A prompt is shots and a query, each a picture and a text; it can be had as tokens for an engine and as parts for HTTP.
"""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from model.config import VisionConfig
from model.media import MediaLimits, load_image, resize
from model.prompt import EndOfChunk, Media, Segment, Text, encode
from model.tokenizer import PromptTokenizer
from server.media.source import source_digest
from server.wire import Generate, Sampling

NOUNS = ("dog", "cat", "horse", "bird", "boat", "train", "house", "tree", "street", "table", "cup", "child")
ADJECTIVES = ("red", "green", "small", "large", "old", "white", "wooden", "sleepy")
VERBS = ("stands", "sits", "waits", "rests", "stays", "hides")
PLACES = ("in the snow", "on the grass", "by a river", "near the sea", "under a bridge", "beside a wall")
TEXT_LENGTH = 24
SIDE = 224


@dataclass(frozen=True, slots=True)
class Picture:
    """A smooth random picture, as the JPEG that a client would send."""

    data: bytes

    @property
    def digest(self) -> bytes:
        return source_digest(self.data, "image")

    def frames(self, config: VisionConfig) -> np.ndarray:  # uint8 [1, h, w, 3]
        return resize(load_image(self.data, MediaLimits()), config)[None]


@lru_cache(maxsize=4096)
def picture(seed: int) -> Picture:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return Picture(stream.getvalue())


def text(seed: int) -> str:
    """A caption of one length in all, so that a byte tokenizer gives prompts of one length, and a batch no padding."""
    draw = random.Random(seed)
    caption = " ".join(map(draw.choice, (ADJECTIVES, NOUNS, VERBS, PLACES)))
    return caption[:TEXT_LENGTH].rstrip().ljust(TEXT_LENGTH, ".")


@dataclass(frozen=True, slots=True)
class Shot:
    picture: Picture
    text: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """Shots, then the query whose text is to be continued. `has_ends`: the family ends a shot with a token."""

    shots: tuple[Shot, ...]
    query: Shot
    has_ends: bool

    def segments(self) -> list[Segment]:
        ends: list[Segment] = [EndOfChunk()] if self.has_ends else []
        shots = [s for shot in self.shots for s in (Media(shot.picture.digest), Text(shot.text), *ends)]
        return [*shots, Media(self.query.picture.digest), Text(self.query.text)]

    def parts(self) -> list[dict[str, Any]]:
        """As the HTTP API takes it."""
        ends = [{"type": "end_of_chunk"}] if self.has_ends else []
        shots = [part for shot in self.shots for part in (*_parts(shot), *ends)]
        return [*shots, *_parts(self.query)]

    def pictures(self) -> list[Picture]:
        return [shot.picture for shot in (*self.shots, self.query)]

    def request(self, request_id: str, tokenizer: PromptTokenizer, sampling: Sampling) -> Generate:
        encoded = encode(self.segments(), tokenizer)
        return Generate(
            request_id=request_id,
            prompt=encoded,
            sampling=sampling,
        )


def _parts(shot: Shot) -> tuple[dict[str, Any], dict[str, Any]]:
    url = "data:image/jpeg;base64," + base64.b64encode(shot.picture.data).decode()
    return {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": shot.text}


class Prompts:
    """A source of prompts of which no two share a seed: pictures and texts that nobody has seen yet."""

    def __init__(self, tokenizer: PromptTokenizer, seed: int = 0) -> None:
        self._has_ends = bool(tokenizer.prompt.end_of_chunk)
        self._next = seed << 32

    def shot(self) -> Shot:
        self._next += 1
        return Shot(picture(self._next), text(self._next))

    def support_set(self, num_shots: int) -> tuple[Shot, ...]:
        return tuple(self.shot() for _ in range(num_shots))

    def ask(self, shots: tuple[Shot, ...], seen: Picture | None = None) -> Prompt:
        """A new question; about a new picture, unless one is given."""
        new = self.shot()
        return Prompt(shots, new if seen is None else Shot(seen, new.text), self._has_ends)

    def shared(self, num_prompts: int, num_shots: int) -> list[Prompt]:
        """Different queries with one support set, new on each call."""
        shots = self.support_set(num_shots)
        return [self.ask(shots) for _ in range(num_prompts)]


def frames_of(prompts: Iterable[Prompt], config: VisionConfig) -> dict[bytes, np.ndarray]:
    """Decoded media by source digest: decoding is not what is measured."""
    pictures = {p.digest: p for prompt in prompts for p in prompt.pictures()}
    return {digest: p.frames(config) for digest, p in pictures.items()}


def greedy(max_tokens: int) -> Sampling:
    """Exactly `max_tokens` tokens, the likeliest each time: every program under test can do this."""
    return Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def mean_length(requests: Sequence[Generate]) -> float:
    return sum(len(request.prompt.token_ids) for request in requests) / max(len(requests), 1)
