"""An `Inspect` in hand: one token's view of its picture, from a forward of its own behind a step.

All its media are encoded anew, from pixels: a picture's patches are in no cache. It is meant for looking into the model,
not for traffic.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import inspect
from server.engine.media_cache import MediaCache
from server.engine.results import NOT_FINITE
from server.engine.runner import Runner
from server.engine.scheduler import Plan
from server.engine.tasks.task import Task, wanted
from server.wire import AttentionMap, Gates, Inspect, Inspected, Outbound


class Inspection(Task):
    turn_is_forward = True

    def __init__(self, request: Inspect, runner: Runner, media: MediaCache) -> None:
        super().__init__(request.request_id)
        self._request = request
        self._runner = runner
        self._cache = media
        # what comes behind the token is not seen
        self._media = request.prompt.media[: request.prompt.media_index[request.token] + 1]
        self._frames: dict[bytes, NDArray[np.uint8]] = {}

    @property
    def media(self) -> Collection[bytes]:
        return self._media

    def plan(self, plan: Plan) -> Iterator[Outbound]:
        yield from wanted(self._cache.want([source for source in self._media if source not in self._frames]))

    def supply(self, source: bytes, frames: NDArray[np.uint8]) -> None:
        if source in self._media:
            self._frames[source] = frames

    @property
    def can_turn(self) -> bool:
        return all(source in self._frames for source in self._media)

    def turn(self) -> Iterator[Outbound]:
        if not self.can_turn:
            return
        self.is_over = True
        try:
            maps = self._maps() if self._media else []
        except torch.OutOfMemoryError:
            yield from self.fail("error", "the device has no memory for this inspection")
            return
        if any(not np.isfinite(np.frombuffer(m.data, np.float32)).all() for m in maps):
            yield from self.fail("error", NOT_FINITE)
            return
        gates = [
            Gates(layer=gate.layer, attention=gate.attention, feed_forward=gate.feed_forward)
            for gate in inspect.openness(self._runner.model)
        ]
        yield Inspected(request_id=self.request_id, gates=gates, maps=maps)

    @torch.inference_mode()
    def _maps(self) -> list[AttentionMap]:
        request, model = self._request, self._runner.model
        features = [self._features(source) for source in self._media]
        visual_tokens = torch.cat([model.resampler(one[None]) for one in features]).to(self._runner.dtype)
        seen = inspect.media_weights(
            model,
            request.prompt.token_ids,
            request.prompt.media_index,
            model.fresh_media(visual_tokens),
            request.token,
            request.layers or model.config.gated_layers,
        )
        patches = inspect.patch_shares(model.resampler, features[-1])
        if request.layers:
            return [self._map([layer], seen[layer], patches) for layer in request.layers]
        return [self._map(list(seen), torch.stack(list(seen.values())).mean(0), patches)]

    def _features(self, source: bytes) -> Tensor:  # [F, P, Dv]
        return self._runner.encoder.features([self._frames[source]])[0]

    def _map(self, layers: list[int], shares: Tensor, patches: Tensor) -> AttentionMap:
        grid = inspect.patch_grid(shares, patches, self._runner.model.config.vision).cpu().numpy()
        return AttentionMap(
            layers=layers, visual_tokens=shares.tolist(), shape=grid.shape, data=grid.astype(np.float32).tobytes()
        )
