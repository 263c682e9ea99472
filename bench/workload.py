"""Few-shot requests that share their support sets, generated from seeds and therefore the same on every machine.

A prompt is shots and a query, each an image and a text. It converts to a request of an engine and to the parts of the HTTP
API.
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
from model.prompt import EncodedPrompt, EndOfChunk, Media, PromptTokenizer, Segment, Text, encode
from server.media.source import encoded
from server.wire import Generate, Sampling

NOUNS = ("dog", "cat", "horse", "bird", "boat", "train", "house", "tree", "street", "table", "cup", "child")
ADJECTIVES = ("red", "green", "small", "large", "old", "white", "wooden", "sleepy")
VERBS = ("stands", "sits", "waits", "rests", "stays", "hides")
LOCATIONS = ("in the snow", "on the grass", "by a river", "near the sea", "under a bridge", "beside a wall")
TEXT_LENGTH = 24
SIDE = 224


@dataclass(frozen=True, slots=True)
class JpegImage:
    """A smooth random image, encoded as the JPEG that a client would send."""

    data: bytes

    @property
    def digest(self) -> bytes:
        return encoded(self.data, "image", "").digest

    def frames(self, config: VisionConfig) -> np.ndarray:  # uint8 [1, h, w, 3]
        return resize(load_image(self.data, MediaLimits()), config)[None]


@lru_cache(maxsize=4096)
def random_image(seed: int) -> JpegImage:
    """Return the image of a seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return JpegImage(stream.getvalue())


def random_text(seed: int) -> str:
    """Return the caption of a seed. All have the same length, so that with a byte tokenizer a batch needs no padding."""
    draw = random.Random(seed)
    caption = " ".join(map(draw.choice, (ADJECTIVES, NOUNS, VERBS, LOCATIONS)))
    return caption[:TEXT_LENGTH].rstrip().ljust(TEXT_LENGTH, ".")


@dataclass(frozen=True, slots=True)
class Shot:
    """An image and its text."""

    image: JpegImage
    text: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """Shots, then the query whose text the model continues. `has_ends` says that the family ends each shot with a token."""

    shots: tuple[Shot, ...]
    query: Shot
    has_ends: bool

    def segments(self) -> list[Segment]:
        ends: list[Segment] = [EndOfChunk()] if self.has_ends else []
        shots = [s for shot in self.shots for s in (Media(shot.image.digest), Text(shot.text), *ends)]
        return [*shots, Media(self.query.image.digest), Text(self.query.text)]

    def parts(self) -> list[dict[str, Any]]:
        """Return the prompt as parts of the HTTP API."""
        ends = [{"type": "end_of_chunk"}] if self.has_ends else []
        shots = [part for shot in self.shots for part in (*_parts(shot), *ends)]
        return [*shots, *_parts(self.query)]

    def images(self) -> list[JpegImage]:
        return [shot.image for shot in (*self.shots, self.query)]

    def request(self, request_id: str, tokenizer: PromptTokenizer, sampling: Sampling) -> Generate:
        encoded = encode(self.segments(), tokenizer)
        return Generate(
            request_id=request_id,
            prompt=encoded,
            sampling=sampling,
        )


def _parts(shot: Shot) -> tuple[dict[str, Any], dict[str, Any]]:
    url = "data:image/jpeg;base64," + base64.b64encode(shot.image.data).decode()
    return {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": shot.text}


class Prompts:
    """A source of prompts with images and texts that no earlier prompt had."""

    def __init__(self, tokenizer: PromptTokenizer, seed: int = 0) -> None:
        self._has_ends = bool(tokenizer.prompt.end_of_chunk)
        self._next = seed << 32

    def new_shot(self) -> Shot:
        self._next += 1
        return Shot(random_image(self._next), random_text(self._next))

    def new_support_set(self, num_shots: int) -> tuple[Shot, ...]:
        return tuple(self.new_shot() for _ in range(num_shots))

    def new_prompt(self, shots: tuple[Shot, ...], image: JpegImage | None = None) -> Prompt:
        """Return a prompt with a new query text, and with a new query image unless `image` is set."""
        query = self.new_shot()
        return Prompt(shots, query if image is None else Shot(image, query.text), self._has_ends)

    def sharing_shots(self, num_prompts: int, num_shots: int) -> list[Prompt]:
        """Return prompts with different queries and one new support set."""
        shots = self.new_support_set(num_shots)
        return [self.new_prompt(shots) for _ in range(num_prompts)]


def frames_of(prompts: Iterable[Prompt], config: VisionConfig) -> dict[bytes, np.ndarray]:
    """Return the decoded media of prompts by source digest, so that a measurement does not include decoding."""
    images = {image.digest: image for prompt in prompts for image in prompt.images()}
    return {digest: image.frames(config) for digest, image in images.items()}


class RandomTexts:
    """Prompts without media, each with a new text."""

    def __init__(self, tokenizer: PromptTokenizer) -> None:
        self._tokenizer = tokenizer
        self._num_texts = 0

    def token_ids(self, length: int) -> list[int]:
        token_ids: list[int] = []
        while len(token_ids) < length:
            self._num_texts += 1
            token_ids += self._tokenizer.encode_plain(random_text(self._num_texts) + " ")
        return token_ids[:length]


def text_request(request_id: str, token_ids: list[int], max_tokens: int) -> Generate:
    """Return a request for exactly `max_tokens` tokens after a prompt without media."""
    prompt = EncodedPrompt(token_ids=token_ids, media_index=[-1] * len(token_ids), media=[])
    return Generate(request_id=request_id, prompt=prompt, sampling=greedy(max_tokens))


def greedy(max_tokens: int) -> Sampling:
    """Return greedy sampling of exactly `max_tokens` tokens, which every program under test supports."""
    return Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def mean_length(requests: Sequence[Generate]) -> float:
    """Return the mean number of prompt tokens."""
    return sum(len(request.prompt.token_ids) for request in requests) / max(len(requests), 1)
