"""Encodes media: frames through vision encoder and resampler into pages, visual tokens and pooled features.

Media of one length are one batch. Visual tokens from host memory need only their keys and values. Output that is not
finite is not cached, and its key is noted as nonfinite.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.batch import MediaPages
from model.inference import InferenceModel
from model.vision import normalise
from server.engine.media_cache import Encoding, MediaCache

# pages from visual tokens in host memory that are computed at once: they take memory in addition to the slots
REBUILT_TOGETHER = 8


class Encoder:
    """Runs the model's media side; `pages` are the device's slots, and `media` records what is cached."""

    def __init__(self, model: InferenceModel, pages: MediaPages, media: MediaCache) -> None:
        self._model = model.flamingo
        self._project = model.project_media
        self._pages = pages.pages
        self._media = media
        self._pixel_dtype = next(self._model.vision.parameters()).dtype

    def run(self, encodings: Sequence[Encoding]) -> None:
        by_length: dict[int, list[Encoding]] = defaultdict(list)
        kept: list[tuple[Encoding, Tensor]] = []
        for encoding in _last_of_each_slot(encodings):
            if encoding.visual_tokens is not None:
                kept.append((encoding, encoding.visual_tokens))
            elif encoding.frames is not None:
                by_length[len(encoding.frames)].append(encoding)
        for first in range(0, len(kept), REBUILT_TOGETHER):
            group = kept[first : first + REBUILT_TOGETHER]
            visual_tokens = torch.stack([tokens for _, tokens in group])
            self._fill([encoding for encoding, _ in group], self._put(visual_tokens))
        for same_length in by_length.values():
            self._encode(same_length)

    def _encode(self, encodings: list[Encoding]) -> None:
        clips = [encoding.frames for encoding in encodings if encoding.frames is not None]
        features = self.features(clips)
        visual_tokens = self._model.resampler(features).to(self._pages.dtype)
        self._fill(encodings, visual_tokens)
        self._keep([encoding.key for encoding in encodings], visual_tokens.cpu(), pool(features))

    def _keep(self, keys: list[bytes], visual_tokens: Tensor, pooled: NDArray[np.float32]) -> None:
        for key, tokens, vector in zip(keys, visual_tokens, pooled, strict=True):
            if tokens.isfinite().all() and np.isfinite(vector).all():
                self._media.host.put(key, tokens.clone())
                self._media.pooled.put(key, vector.copy())
            else:
                self._media.nonfinite.add(key)

    def features(self, clips: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Frames [F, h, w, 3] of M media, all of one length -> [M, F, P, Dv]."""
        frames = torch.from_numpy(np.stack(clips)).to(self._pages.device)
        pixels = normalise(frames.flatten(0, 1), self._model.config.vision).to(self._pixel_dtype)
        return self._model.features(pixels.unflatten(0, frames.shape[:2]))

    def _put(self, visual_tokens: Tensor) -> Tensor:
        return visual_tokens.to(self._pages.device, self._pages.dtype)

    def _fill(self, encodings: list[Encoding], visual_tokens: Tensor) -> None:
        indices = [i for i, encoding in enumerate(encodings) if encoding.slot is not None]
        if indices:
            slots = torch.tensor([encodings[i].slot for i in indices], device=self._pages.device)
            self._pages[slots] = self._project(visual_tokens[indices])


def pool(features: Tensor) -> NDArray[np.float32]:
    """Features [M, F, P, Dv] -> [M, Dv]: their mean over frames and patches, of length one."""
    return unit(features.float().mean((1, 2)))


def unit(vectors: Tensor) -> NDArray[np.float32]:
    """Scale vectors [N, D] to length one; a vector of zeros stays zero."""
    array: NDArray[np.float32] = torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()
    return array


def _last_of_each_slot(encodings: Sequence[Encoding]) -> Iterable[Encoding]:
    """Drop encodings into slots that were reassigned within one plan: the last one owns the slot."""
    owner = {encoding.slot: encoding for encoding in encodings}
    return [encoding for encoding in encodings if encoding.slot is None or owner[encoding.slot] is encoding]
