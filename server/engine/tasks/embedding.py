"""Answers `Embed` and `EmbedText`: vectors of media and of texts, computed between the steps of other requests.

When a media item is encoded for any request, both its pooled features and its visual tokens are cached, so it is not
encoded twice. The features are answered first: a later step computes the visual tokens, while the client may already write
a prompt that shows them. Pixels are requested for a few media at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from model.layered import LayeredForward
from server.engine.caches.media import MediaCache
from server.engine.config import EngineConfig
from server.engine.device.encoder import unit
from server.engine.device.runner import Runner
from server.engine.device.sampler import NOT_FINITE
from server.engine.plan import Plan
from server.engine.tasks.task import ForwardTask, RequestError, SideTask
from server.wire import Embed, Embedded, EmbedText, Outbound

WINDOW = 16  # media whose pixels are requested at the same time


class MediaEmbedding(SideTask):
    def __init__(self, request: Embed, media: MediaCache) -> None:
        super().__init__(request.request_id, list(dict.fromkeys(request.media)))
        self._request = request
        self._cache = media
        self._vectors: dict[bytes, NDArray[np.float32]] = {}
        self._encoded: set[bytes] = set()  # keys that were encoded for this request

    def needs_pooling(self, source: bytes) -> bool:
        return source in self.media

    def plan(self, plan: Plan) -> Iterable[bytes]:
        """Encode media whose pixels have arrived, within the step's limit of frames; return sources to request."""
        lacking = []
        for source in islice(self.media, WINDOW):
            key = self._cache.content_keys.get(source)
            if key is None or not self._is_provided(key, plan):
                lacking.append(source)
        return self._cache.request(lacking)

    @property
    def has_frames(self) -> bool:
        keys = map(self._cache.content_keys.get, islice(self.media, WINDOW))
        return any(key is not None and key not in self._cache.pooled and self._cache.has_frames(key) for key in keys)

    def _is_provided(self, key: bytes, plan: Plan) -> bool:
        """Return whether no pixels are missing: the vector is cached or in this step, or its frames have arrived.

        Frames that have arrived are added to this step if it has room for them.
        """
        if key in self._cache.pooled or any(key == p.encoding.key and p.count for p in plan.pieces):
            return True
        if not self._cache.has_frames(key):
            return False
        if (piece := self._cache.encode_for_pooling(key, plan.frames_left)) is not None:
            plan.add_piece(piece, self.request_id)
            self._encoded.add(key)
        return True

    @property
    def can_run(self) -> bool:
        return not self.media or any(map(self._is_encoded, self.media))

    def _is_encoded(self, source: bytes) -> bool:
        """Return whether the features are known, or known not to be finite."""
        return self._vector(source) is not None or self._cache.content_keys.get(source) in self._cache.nonfinite

    def run_between_steps(self, has_time: Callable[[], bool]) -> Iterable[Outbound]:
        for source in self.media:
            if (vector := self._vector(source)) is not None:
                self._vectors[source] = vector
            elif self._cache.content_keys.get(source) in self._cache.nonfinite:
                return self.end("error", NOT_FINITE)
        self.media = [source for source in self.media if source not in self._vectors]
        if self.media:
            return []
        self.is_finished = True
        num_encoded = len(self._encoded)
        vectors = [self._vectors[source] for source in self._request.media]
        return [_embedded(self.request_id, vectors, num_encoded, num_cached=len(self._vectors) - num_encoded)]

    def _vector(self, source: bytes) -> NDArray[np.float32] | None:
        key = self._cache.content_keys.get(source)
        return None if key is None else self._cache.pooled.get(key)


class TextEmbedding(ForwardTask):
    """Vectors of texts: the language model's last hidden states without media, mean over tokens.

    Short texts are computed together. Raises `RequestError` for texts that are empty or too long.
    """

    def __init__(self, request: EmbedText, runner: Runner) -> None:
        self._model = runner.model.language_model
        self._followers = runner.followers
        _check_texts(request, runner.config)
        self._texts = deque(request.texts)
        super().__init__(request.request_id, (), runner.config, len(self._model.layers))

    @property
    def can_run(self) -> bool:
        return True

    @torch.inference_mode()
    def pieces(self) -> Generator[float, None, Iterable[Outbound]]:
        vectors: list[NDArray[np.float32]] = []
        while self._texts:
            texts = self._next_texts()
            forward = LayeredForward(self._model, texts, self.max_tokens)
            with self._followers.embedding(self.request_id, texts, self.max_tokens) as begin_piece:
                for layer in self._model.layers:
                    pieces = forward.run(layer)
                    for _ in forward.spans:
                        begin_piece()
                        yield next(pieces)
            hidden = forward.hidden_states().float()
            vectors.extend(unit(torch.stack([part.mean(0) for part in hidden.split(list(map(len, texts)))])))
            if not np.isfinite(vectors[-len(texts) :]).all():
                return self.end("error", NOT_FINITE)
        return [_embedded(self.request_id, vectors)]

    def _next_texts(self) -> list[list[int]]:
        texts: list[list[int]] = []
        tokens_left = self.max_tokens
        while self._texts and (not texts or len(self._texts[0]) <= tokens_left):
            texts.append(self._texts.popleft())
            tokens_left -= len(texts[-1])
        return texts


def _check_texts(request: EmbedText, config: EngineConfig) -> None:
    if not all(request.texts):
        raise RequestError("each text must have at least one token")
    longest = max(map(len, request.texts), default=0)
    if longest > config.max_model_len:
        raise RequestError(f"a text of {longest} tokens exceeds max_model_len {config.max_model_len}")


def _embedded(
    request_id: str, vectors: list[NDArray[np.float32]], num_encoded: int = 0, num_cached: int = 0
) -> Embedded:
    array = np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)
    return Embedded(
        request_id=request_id,
        shape=(array.shape[0], array.shape[1]),
        data=array.tobytes(),
        media_encoded=num_encoded,
        media_cached=num_cached,
    )
