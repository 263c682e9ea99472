"""Support sets on a real server, and few-shot requests that show all of their examples with a new query image."""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass
from typing import Any

from bench.fewshot import COMPLETIONS, Client
from bench.workload import random_image, random_text


@dataclass(frozen=True, slots=True)
class Answer:
    """The seconds and the usage of an answer."""

    seconds: float
    usage: dict[str, Any]

    @property
    def cached_tokens(self) -> int:
        count: int = self.usage["prompt_tokens_details"]["cached_tokens"]
        return count

    @property
    def computed_tokens(self) -> int:
        count: int = self.usage["prompt_tokens"]
        return count - self.cached_tokens

    @property
    def num_cached_media(self) -> int:
        count: int = self.usage["fewshot_details"]["media_cached"]
        return count


class SupportSets:
    """Creates support sets of new images, and sends requests with them. `seed` makes the images differ from others'."""

    def __init__(self, client: Client, seed: int = 1) -> None:
        self._client = client
        self._last_seed = seed << 40

    def create(self, num_shots: int) -> str:
        examples = [{"image": self._upload(), "text": random_text(self._last_seed)} for _ in range(num_shots)]
        support_set_id: str = self._client.post("/v1/support_sets", {"examples": examples})["id"]
        return support_set_id

    def ask(self, support_set: str, num_shots: int, max_tokens: int = 1) -> Answer:
        body = {
            "query": {"image": "data:image/jpeg;base64," + base64.b64encode(self._new_image()).decode()},
            "examples": {"support_set": support_set, "k": num_shots, "strategy": "first"},
            "template": "caption",
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        began = time.perf_counter()
        answer = self._client.post(COMPLETIONS, body)
        return Answer(time.perf_counter() - began, answer["usage"])

    def _upload(self) -> str:
        image_id: str = self._client.post("/v1/images", self._new_image(), "image/jpeg")["id"]
        return image_id

    def _new_image(self) -> bytes:
        self._last_seed += 1
        return random_image(self._last_seed).data
