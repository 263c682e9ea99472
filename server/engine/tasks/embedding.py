"""`Embed` and `EmbedText` in hand: vectors of media and of texts, worked out behind the steps of those who generate.

A media that is encoded for anybody leaves its pooled features behind, and one that is encoded for its features leaves its
visual tokens: none is encoded twice. Pixels are asked for a few media at a time, however many are to be embedded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from server.engine.media_cache import MediaCache
from server.engine.results import NOT_FINITE
from server.engine.runner import Runner
from server.engine.scheduler import Plan
from server.engine.tasks.task import Task, wanted
from server.wire import Embed, Embedded, EmbedText, Outbound

WINDOW = 16  # media that pixels are asked for at once


class MediaEmbedding(Task):
    def __init__(self, request: Embed, media: MediaCache) -> None:
        super().__init__(request.request_id)
        self._request = request
        self._cache = media
        self._missing = list(dict.fromkeys(request.media))
        self._vectors: dict[bytes, NDArray[np.float32]] = {}
        self._held: list[bytes] = []  # keys whose slots are held until the step is through

    @property
    def media(self) -> Collection[bytes]:
        return self._missing

    def pools(self, source: bytes) -> bool:
        return source in self._missing

    def plan(self, plan: Plan) -> Iterator[Outbound]:
        """Encode what has its pixels, within the step's frames; ask for the others' pixels."""
        lacking = []
        for source in self._missing[:WINDOW]:
            key = self._cache.key(source)
            if key is None or not self._is_coming(key, plan):
                lacking.append(source)
        yield from wanted(self._cache.want(lacking))

    def _is_coming(self, key: bytes, plan: Plan) -> bool:
        """Whether its vector needs no pixels to be sent: it is there, or in this step, or its pixels wait for a step."""
        if key in self._cache.pooled or any(key == e.key and e.frames is not None for e in plan.encodings):
            return True
        if not self._cache.has_frames(key):
            return False
        cost = self._cache.num_frames_of(key)
        if cost <= plan.frames_left or not plan.encodings:  # a media of more frames than the budget goes alone
            plan.frames_left -= cost
            encoding = self._cache.begin_pooling(key)
            plan.encodings.append(encoding)
            self._held += [key] if encoding.slot is not None else []
        return True

    @property
    def can_turn(self) -> bool:
        return not self._missing or bool(self._held) or any(map(self._is_settled, self._missing))

    def _is_settled(self, source: bytes) -> bool:
        return self._vector(source) is not None or self._cache.key(source) in self._cache.nonfinite

    def turn(self) -> Iterator[Outbound]:
        for key in self._held:
            self._cache.slots.release(key)
        self._held.clear()
        for source in self._missing:
            if (vector := self._vector(source)) is not None:
                self._vectors[source] = vector
            elif self._cache.key(source) in self._cache.nonfinite:
                self.is_over = True
                yield from self.fail("error", NOT_FINITE)
                return
        self._missing = [source for source in self._missing if source not in self._vectors]
        if not self._missing:
            self.is_over = True
            yield embedded(self.request_id, [self._vectors[source] for source in self._request.media])

    def _vector(self, source: bytes) -> NDArray[np.float32] | None:
        key = self._cache.key(source)
        return None if key is None else self._cache.pooled.get(key)


class TextEmbedding(Task):
    """Each turn computes texts of up to `max_tokens` tokens together; a longer one goes alone."""

    turn_is_forward = True

    def __init__(self, request: EmbedText, runner: Runner, max_tokens: int) -> None:
        super().__init__(request.request_id)
        self._runner = runner
        self._max_tokens = max_tokens
        self._texts = deque(request.texts)
        self._vectors: list[NDArray[np.float32]] = []

    @property
    def can_turn(self) -> bool:
        return True

    def turn(self) -> Iterator[Outbound]:
        if chunk := self._chunk():
            vectors = self._runner.embed_texts(chunk)
            self._vectors.extend(vectors)
            if not np.isfinite(vectors).all():
                self.is_over = True
                yield from self.fail("error", NOT_FINITE)
                return
        if not self._texts:
            self.is_over = True
            yield embedded(self.request_id, self._vectors)

    def _chunk(self) -> list[list[int]]:
        chunk: list[list[int]] = []
        room = self._max_tokens
        while self._texts and (not chunk or len(self._texts[0]) <= room):
            chunk.append(self._texts.popleft())
            room -= len(chunk[-1])
        return chunk


def embedded(request_id: str, vectors: list[NDArray[np.float32]]) -> Embedded:
    array = np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)
    return Embedded(request_id=request_id, shape=(array.shape[0], array.shape[1]), data=array.tobytes())
