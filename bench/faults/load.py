"""Clients that send requests of many kinds during a fault, and record each answer, refusal or missing answer."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass

from bench import mixture
from bench.target import Answer, Request, Target, get, image_request, jpeg, post, text_request

NUM_CLIENTS = 6
MAX_NAME = 10**9
REQUEST_SECONDS = 90.0


@dataclass(frozen=True, slots=True)
class Sent:
    """A request's kind, its answer, and the path of the resource that the answer acknowledges as stored."""

    kind: str
    answer: Answer
    stored: str | None


class Load:
    """Clients that send one request after the other from `start` to `stop`."""

    def __init__(self, target: Target, *, num_clients: int = NUM_CLIENTS, seed: int = 0) -> None:
        self.sent: list[Sent] = []
        self._target = target
        self._stop = threading.Event()
        self._clients = [
            threading.Thread(target=self._run, args=(random.Random(seed << 8 | i),), daemon=True)
            for i in range(num_clients)
        ]

    def start(self) -> Load:
        mixture.prepare(self._target)
        for client in self._clients:
            client.start()
        return self

    def stop(self) -> None:
        """Let each client finish its last request."""
        self._stop.set()
        for client in self._clients:
            client.join(REQUEST_SECONDS + 5)

    @property
    def acknowledged(self) -> list[str]:
        return [sent.stored for sent in self.sent if sent.stored is not None]

    def unclear(self) -> list[Sent]:
        return [sent for sent in self.sent if sent.answer.status and not sent.answer.is_clear]

    def unanswered(self) -> list[Sent]:
        return [sent for sent in self.sent if not sent.answer.status]

    def lost(self, target: Target) -> list[str]:
        """Return the paths of resources that were acknowledged but are no longer stored."""
        return [path for path in self.acknowledged if target.send(get(path), timeout=30).status != 200]

    def _run(self, rng: random.Random) -> None:
        while not self._stop.is_set():
            kind, request = draw(rng)
            answer = self._target.send(request, timeout=REQUEST_SECONDS)
            self.sent.append(Sent(kind, answer, stored_path(kind, answer)))
            self._stop.wait(0.05 if answer.status == 200 else 0.2)


def draw(rng: random.Random) -> tuple[str, Request]:
    """Return a request that answers, reads or stores."""
    number = rng.randrange(MAX_NAME)
    kinds = {
        "text": lambda: text_request(8, prompt=f"{number} birds", stream=rng.random() < 0.5),
        "image": lambda: image_request(number),
        "new set": lambda: post("/v1/support_sets", name=f"kept-{number}", examples=[{"text": "a", "question": "?"}]),
        "upload": lambda: Request(path="/v1/images", body=jpeg(number), headers={"Content-Type": "image/jpeg"}),
        "list": lambda: get("/v1/support_sets?limit=5"),
    }
    if rng.random() < 0.3:
        return mixture.draw(rng)
    kind = rng.choice(sorted(kinds))
    return kind, kinds[kind]()


def stored_path(kind: str, answer: Answer) -> str | None:
    """Return the path of the resource that an answer acknowledges as stored, if any."""
    folder = {"new set": "support_sets", "upload": "images"}.get(kind)
    if folder is None or answer.status not in (200, 201):
        return None
    fields = answer.json()
    # the mixture's own sets end by themselves
    return None if fields.get("expires_at") else f"/v1/{folder}/{fields['id']}"
