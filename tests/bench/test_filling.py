"""Tests that caches are filled with new content, and that a fill ends in its time; the server is a stub."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench.filling import Cache, fill
from bench.random_models import SIZES, config
from bench.target import Answer, Request, Target
from server.engine.caches.media import MAX_POOLED
from server.settings import Settings

SETTINGS = Settings(host_media_mb=1)
CONFIG = config("tiny", SIZES["tiny"])
ENGINE = {"num_blocks": 600, "block_size": 4, "num_media_slots": 40, "max_model_len": 108, "dtype": "float32"}


class StubTarget:
    """Answers as a server whose texts have a token per character, and that has seen no content before."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, request: Request, *, timeout: float = 0) -> Answer:
        if request.path == "/version":
            return self._answer({"engine": ENGINE})
        prompt = json.loads(request.body)["prompt"]
        self.sent.append(prompt)
        details = {"media_encoded": len(prompt) if isinstance(prompt, list) else 0}
        usage = {"prompt_tokens": len(prompt), "prompt_tokens_details": {"cached_tokens": 0}}
        return self._answer({"usage": {**usage, "fewshot_details": details}})

    def _answer(self, value: Any) -> Answer:
        return Answer(status=200, seconds=0, body=json.dumps(value).encode())


def filled(target: StubTarget, seconds: float) -> list[Cache]:
    return fill(cast(Target, target), CONFIG, SETTINGS, seconds)


def test_new_texts_and_images_are_sent_until_all_caches_are_full() -> None:
    target = StubTarget()
    text, pages, visual_tokens, pooled = filled(target, 60)
    assert (text.num_written, pages.num_written, pooled.num_written) == (600, 40, MAX_POOLED)
    assert visual_tokens.num_written * visual_tokens.entry_bytes == 2**20
    assert sum(isinstance(prompt, str) for prompt in target.sent) == 24  # of 25 full blocks each
    images = [part["image_url"]["url"] for prompt in target.sent if isinstance(prompt, list) for part in prompt]
    assert len(set(images)) == len(images) >= max(visual_tokens.num_entries, MAX_POOLED)


def test_a_fill_that_runs_out_of_time_tells_what_is_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    # only the module's: an event loop in another thread would wait for hours
    monkeypatch.setattr("bench.filling.time", SimpleNamespace(monotonic=lambda: next(now)))
    text, pages, visual_tokens, pooled = filled(StubTarget(), 3)  # the clock is read once per request
    assert text.unwritten_bytes == 550 * text.entry_bytes
    assert pages.unwritten_bytes == 40 * pages.entry_bytes
    assert visual_tokens.unwritten_bytes == 2**20
    assert pooled.unwritten_bytes == 4 * CONFIG.vision.feature_dim * MAX_POOLED
