"""An engine without a model and without torch, which a real worker process runs: it starts quickly."""

from __future__ import annotations

import ctypes
import gc
import time
from array import array
from collections import deque
from pathlib import Path
from typing import Any

from server.settings import Settings, SettingsError
from server.wire import (
    Abort,
    Admitted,
    Embed,
    Embedded,
    EmbedText,
    Finished,
    Gates,
    Generate,
    Inspect,
    Inspected,
    MediaFailed,
    MediaPixels,
    MediaWanted,
    Outbound,
    Pin,
    Request,
    Score,
    Scored,
    Token,
)

RAISE, SLEEP, FAIL, REFUSE, EXIT = 1, 2, 3, 4, 5


class ScriptedEngine:
    """Repeats the prompt, one token per step, up to `max_tokens`, once it holds the prompt's media.

    The seed is a script: in `RAISE` the step raises, in `SLEEP` it hangs, in `FAIL` the request fails, in `REFUSE` by the
    fault of its seed; in `EXIT` the main thread exits and the process remains, as one does while its memory is freed.
    Replies to other requests are made of their own numbers: a candidate's ids, a digest's first byte, a text's length, a
    token's position.
    """

    def __init__(self) -> None:
        self.requests: dict[str, deque[int]] = {}
        self.left: dict[str, int] = {}
        self.waiting: dict[str, Request] = {}
        self.pinned: set[bytes] = set()
        self.held: set[bytes] = set()
        self.requested: set[bytes] = set()
        self.events: list[Outbound] = []
        self.num_aborted = 0

    def add(self, request: Request) -> None:
        self.waiting[request.request_id] = request
        new = [digest for digest in dict.fromkeys(media_of(request)) if digest not in self.held | self.requested]
        self.requested.update(new)
        self.events += map(MediaWanted, new)

    def abort(self, abort: Abort) -> None:
        self.num_aborted += 1
        if abort.index is not None:
            self.events.append(Finished(request_id=abort.request_id, index=abort.index, finish_reason="abort"))
            return
        self.waiting.pop(abort.request_id, None)
        self.requests.pop(abort.request_id, None)

    def supply(self, media: MediaPixels) -> None:
        assert len(media.data) == media.shape[0] * media.shape[1] * media.shape[2] * media.shape[3]
        self.requested.discard(media.digest)
        self.held.add(media.digest)

    def fail_media(self, failure: MediaFailed) -> None:
        self.requested.discard(failure.digest)
        for name, request in list(self.waiting.items()):
            if failure.digest in media_of(request):
                del self.waiting[name]
                self.events.append(Finished(request_id=name, finish_reason="error", error=failure.message))

    def pin(self, pin: Pin) -> None:
        self.pinned = self.pinned | set(pin.digests) if pin.is_kept else self.pinned - set(pin.digests)

    def has_work(self) -> bool:
        return bool(self.requests or self.waiting or self.events)

    def is_waiting_for_media(self) -> bool:
        return bool(self.waiting) and not self.requests and not self.events

    def histograms(self) -> dict[str, dict[str, list[float]]]:
        return {}

    def gauges(self) -> dict[str, float]:
        return {
            "num_preemptions": float(self.num_aborted),
            "media_slots_in_use": float(len(self.held)),
            "media_slots_pinned": float(len(self.pinned)),
            "num_frozen_objects": float(gc.get_freeze_count()),
            "is_collecting": float(gc.isenabled()),
        }

    def step(self) -> list[Outbound]:
        for name, request in list(self.waiting.items()):
            if self.held.issuperset(media_of(request)):
                del self.waiting[name]
                if not isinstance(request, Generate):
                    self.events.append(reply(request))
                    continue
                if request.sampling.seed == RAISE:
                    raise RuntimeError("scripted to raise")
                if request.sampling.seed == SLEEP:
                    time.sleep(600)
                if request.sampling.seed == EXIT:
                    ctypes.PyDLL(None).pthread_exit(None)
                if request.sampling.seed in (FAIL, REFUSE):
                    param = "seed" if request.sampling.seed == REFUSE else ""
                    error = "scripted to fail"
                    self.events.append(Finished(request_id=name, finish_reason="error", error=error, param=param))
                    continue
                self.requests[name] = deque(request.prompt.token_ids)
                self.left[name] = request.sampling.max_tokens
                self.events.append(
                    Admitted(request_id=name, queue_seconds=0.0, media_encoded=len(request.prompt.media))
                )
        for name, ids in list(self.requests.items()):
            ids.rotate(-1)
            self.left[name] -= 1
            is_last = self.left[name] == 0
            self.events.append(Token(request_id=name, token_id=ids[-1], finish_reason="length" if is_last else None))
            if is_last:
                del self.requests[name]
        time.sleep(0.002)
        events, self.events = self.events, []
        return events


def media_of(request: Request) -> list[bytes]:
    match request:
        case EmbedText():
            return []
        case Embed():
            return request.media
        case _:
            return request.prompt.media


def reply(request: Score | Embed | EmbedText | Inspect) -> Outbound:
    name = request.request_id
    match request:
        case Score():
            logprobs = [[-float(token_id) for token_id in ids] for ids in request.candidates]
            return Scored(request_id=name, logprobs=logprobs, media_encoded=len(request.prompt.media))
        case Embed():
            return embedded(name, [digest[0] for digest in request.media])
        case EmbedText():
            return embedded(name, [len(ids) for ids in request.texts])
        case Inspect():
            gates = [Gates(layer=request.token, attention=0.0, feed_forward=0.0)]
            return Inspected(request_id=name, gates=gates, maps=[])


def embedded(name: str, numbers: list[int]) -> Embedded:
    return Embedded(
        request_id=name,
        shape=(len(numbers), 1),
        data=array("f", numbers).tobytes(),
        media_encoded=len(set(numbers)),
        media_cached=1,
    )


def build(settings: Settings) -> tuple[ScriptedEngine, dict[str, Any]]:
    return ScriptedEngine(), {"device": "scripted"}


def build_fails(settings: Settings) -> tuple[ScriptedEngine, dict[str, Any]]:
    raise RuntimeError("no such weights")


def build_refuses(settings: Settings) -> tuple[ScriptedEngine, dict[str, Any]]:
    raise SettingsError("device: there is none")


def build_if_model_exists(settings: Settings) -> tuple[ScriptedEngine, dict[str, Any]]:
    assert settings.model is not None
    if not Path(settings.model).exists():
        raise RuntimeError("no such weights")
    return build(settings)
