"""Fills the caches of a server with images and texts that it has not seen, within a limited time.

A cache takes memory as it is written. So the memory of a worker with full caches is its current memory plus the bytes that
are still unwritten. This is also known if a slow machine has to end the filling early.
"""

from __future__ import annotations

import random
import string
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.driver import BenchFailed
from bench.target import Request, Target, get, image_part, jpeg, post
from model.config import FlamingoConfig
from model.footprint import page_bytes
from server.engine.build import block_bytes
from server.engine.caches.media import MAX_POOLED
from server.settings import Settings

# requests are short, so that the last one that begins in time ends soon
IMAGES_PER_REQUEST = 16
MAX_CHARACTERS = 1000
REQUEST_SECONDS = 300.0
MIB = 2**20
FLOAT_BYTES = 4


@dataclass(slots=True, kw_only=True)
class Cache:
    """A cache of `num_entries` entries, and how many of them have been written."""

    name: str
    entry_bytes: int
    num_entries: int
    num_written: int = 0

    @property
    def is_full(self) -> bool:
        return self.num_written == self.num_entries

    @property
    def unwritten_bytes(self) -> int:
        return (self.num_entries - self.num_written) * self.entry_bytes

    @property
    def row(self) -> dict[str, str | float]:
        megabyte = self.entry_bytes / 1e6
        return {
            "what": self.name,
            "size MB": self.num_entries * megabyte,
            "written MB": self.num_written * megabyte,
        }

    def write(self, num_entries: int) -> None:
        self.num_written = min(self.num_written + num_entries, self.num_entries)


def fill(target: Target, config: FlamingoConfig, settings: Settings, seconds: float) -> list[Cache]:
    """Send new texts and images until all caches are full, or until the request ends that runs after `seconds`."""
    engine = target.send(get("/version")).json()["engine"]
    text, *media = caches = _caches(config, settings, engine)
    end = time.monotonic() + seconds
    requests = _texts(engine["max_model_len"]), _images()
    while not text.is_full and time.monotonic() < end:
        usage = complete(target, next(requests[0]))["usage"]
        computed = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        text.write(computed // engine["block_size"])
    while not all(cache.is_full for cache in media) and time.monotonic() < end:
        num_encoded = complete(target, next(requests[1]))["usage"]["fewshot_details"]["media_encoded"]
        for cache in media:
            cache.write(num_encoded)
    return caches


def _caches(config: FlamingoConfig, settings: Settings, engine: dict[str, Any]) -> list[Cache]:
    dtype = getattr(torch, engine["dtype"])
    block, page = block_bytes(config, engine["block_size"], dtype), page_bytes(config, dtype)
    tokens = config.resampler.num_latents * config.resampler.dim * dtype.itemsize
    return [
        Cache(name="text cache", entry_bytes=block, num_entries=engine["num_blocks"]),
        Cache(name="media cache", entry_bytes=page, num_entries=engine["num_media_slots"]),
        Cache(name="visual tokens", entry_bytes=tokens, num_entries=settings.host_media_mb * MIB // tokens),
        Cache(name="pooled features", entry_bytes=FLOAT_BYTES * config.vision.feature_dim, num_entries=MAX_POOLED),
    ]


def _texts(max_model_len: int) -> Iterator[Request]:
    rng, length = random.Random(0), min(MAX_CHARACTERS, max_model_len - 8)  # a token has at least one character
    while True:
        text = "".join(rng.choices(string.ascii_lowercase + " ", k=length))
        yield post("/v1/completions", prompt=text, max_tokens=1, ignore_eos=True)


def _images() -> Iterator[Request]:
    rng = random.Random(0)
    while True:
        parts = [image_part(jpeg(rng.getrandbits(62))) for _ in range(IMAGES_PER_REQUEST)]
        yield post("/v1/completions", prompt=parts, max_tokens=1, ignore_eos=True)


def complete(target: Target, request: Request) -> Any:
    """Send a request and return its answer. Raises `BenchFailed` if it fails."""
    answer = target.send(request, timeout=REQUEST_SECONDS)
    if answer.status != 200:
        raise BenchFailed(f"a request failed with status {answer.status}: {answer.body[:500]!r}{answer.error}")
    return answer.json()
