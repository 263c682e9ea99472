"""Answers an `Inspect`: one token's attention to its image, from a separate forward between steps.

All media are encoded again from pixels, because the patches of an image are not cached. It is meant for diagnosis, not for
many requests.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import inspect
from model.batch import MediaPages
from server.engine.caches.media import MediaCache
from server.engine.device.runner import Runner
from server.engine.device.sampler import NOT_FINITE
from server.engine.plan import Plan
from server.engine.tasks.task import ForwardTask, RequestError
from server.wire import AttentionMap, Gates, Inspect, Inspected, Outbound


class Inspection(ForwardTask):
    """One inspection. Raises `RequestError` for a prompt that is too long, and a token or layer that does not exist."""

    def __init__(self, request: Inspect, runner: Runner, media: MediaCache) -> None:
        _check(request, runner.config.max_model_len, runner.model.config.gated_layers)
        self._request = request
        self._runner = runner
        self._cache = media
        self._frames: dict[bytes, NDArray[np.uint8]] = {}
        # media after the token are not read
        read = request.prompt.media[: request.prompt.media_index[request.token] + 1]
        super().__init__(request.request_id, read, runner.config, len(runner.model.language_model.layers))

    def plan(self, plan: Plan) -> Iterable[bytes]:
        return self._cache.request(list(filter(self.lacks_frames, self.media)))

    def lacks_frames(self, source: bytes) -> bool:
        return source not in self._frames

    def receive(self, source: bytes, frames: NDArray[np.uint8]) -> None:
        if source in self.media:
            self._frames[source] = frames

    @property
    def can_run(self) -> bool:
        return not any(map(self.lacks_frames, self.media))

    @torch.inference_mode()
    def pieces(self) -> Generator[float, None, Iterable[Outbound]]:
        maps = (yield from self._maps()) if self.media else []
        if any(not np.isfinite(np.frombuffer(m.data, np.float32)).all() for m in maps):
            return self.end("error", NOT_FINITE)
        gates = [
            Gates(layer=gate.layer, attention=gate.attention, feed_forward=gate.feed_forward)
            for gate in inspect.openness(self._runner.model)
        ]
        return [Inspected(request_id=self.request_id, gates=gates, maps=maps)]

    def _maps(self) -> Generator[float, None, list[AttentionMap]]:
        request, model = self._request, self._runner.model
        layers = request.layers or model.config.gated_layers
        pages: list[Tensor] = []
        for source in self.media:
            features = yield from self._features(self._frames[source])
            yield math.inf
            visual_tokens = model.resampler(features[None]).to(self._runner.dtype)
            pages.append(model.media_kv(visual_tokens))
            yield math.inf
        media = MediaPages(torch.cat(pages), model.config.gated_layers)
        token_ids, media_index = request.prompt.token_ids, request.prompt.media_index
        weights = yield from inspect.media_weights(
            model, token_ids, media_index, media, request.token, layers, self.max_tokens
        )
        patches = inspect.patch_shares(model.resampler, features)
        if request.layers:
            return [self._map([layer], weights[layer], patches) for layer in request.layers]
        return [self._map(list(weights), torch.stack(list(weights.values())).mean(0), patches)]

    def _features(self, frames: NDArray[np.uint8]) -> Generator[float, None, Tensor]:  # [F, P, Dv]
        """Encode a few frames per round."""
        size = self._runner.config.max_frames_per_step
        parts: list[Tensor] = []
        for first in range(0, len(frames), size):
            if parts:
                yield math.inf
            parts.append(self._runner.encoder.features([frames[first : first + size]]))
        return torch.cat(parts)

    def _map(self, layers: list[int], shares: Tensor, patches: Tensor) -> AttentionMap:
        grid = inspect.patch_grid(shares, patches, self._runner.model.config.vision).cpu().numpy()
        return AttentionMap(
            layers=layers, visual_tokens=shares.tolist(), shape=grid.shape, data=grid.astype(np.float32).tobytes()
        )


def _check(request: Inspect, max_model_len: int, gated_layers: Collection[int]) -> None:
    length = len(request.prompt.token_ids)
    if length > max_model_len:
        raise RequestError(f"{length} prompt tokens exceed max_model_len {max_model_len}")
    if not 0 <= request.token < length:
        raise RequestError(f"token is {request.token}, must be at least 0 and below the prompt's {length} tokens")
    if unknown := set(request.layers).difference(gated_layers):
        raise RequestError(f"layers {sorted(unknown)} are not gated layers: the model has {list(gated_layers)}")
