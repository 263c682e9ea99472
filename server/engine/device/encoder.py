"""Encodes media: frames through vision encoder and resampler into pages, visual tokens and pooled features."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.batch import MediaPages
from model.inference import InferenceModel
from model.vision import normalise
from server.engine.caches.media import Encoding, MediaCache, Piece
from server.engine.device.streams import SideStream
from server.engine.device.transfers import Downloads, upload
from server.engine.ranks.messages import NO_FOLLOWERS, Followers

# pages from visual tokens in host memory that are computed at once: they take memory in addition to the slots
REBUILT_TOGETHER = 8


class Encoder:
    """Encodes the media of a step. `pages` are the device's slots, and `media` records what is cached.

    All frames of a step are one batch of the vision encoder, and media of one length one of the resampler. Visual tokens
    from host memory need only their keys and values. Output that is not finite is not cached, and its key is noted.

    On a GPU, all of this runs next to the forwards, on a stream of its own. A forward that reads a page waits until it is
    filled, and the host waits when it needs the results.
    """

    def __init__(
        self, model: InferenceModel, pages: MediaPages, media: MediaCache, followers: Followers = NO_FOLLOWERS
    ) -> None:
        self._followers = followers
        self._model = model.flamingo
        self._project = model.project_media
        self._pages = pages.pages
        self._device = pages.pages.device
        self._media = media
        self._pixel_dtype = next(self._model.vision.parameters()).dtype
        self.stream = SideStream(self._device)
        self._filled: dict[int, torch.cuda.Event] = {}  # by slots of pages for which no forward has waited yet

    def encode(self, pieces: Sequence[Piece], after: torch.cuda.Event | None = None) -> Downloads:
        """Begin to encode, on a GPU after a mark of the current stream; return the results on their way to the host."""
        pieces, results = _last_of_each_slot(pieces), Downloads()
        if pieces:
            with self.stream.after(after):
                self._rebuild(pieces)
                self._encode(pieces, results)
                results.begin()
                filled = self.stream.mark()
            if filled is not None:
                self._filled.update({p.encoding.slot: filled for p in pieces if p.encoding.slot is not None})
        return results

    def await_pages(self, slots: Tensor | None) -> None:
        """Let the current stream wait until the pages in these slots are filled, before its next work."""
        if self._filled and slots is not None:
            for mark in {self._filled.pop(slot) for slot in self._filled.keys() & slots.flatten().tolist()}:
                self.stream.wait(mark)

    def _rebuild(self, pieces: Sequence[Piece]) -> None:
        """Fill the pages of media whose visual tokens are in host memory."""
        kept = [(p.encoding, p.encoding.visual_tokens) for p in pieces if p.encoding.visual_tokens is not None]
        for first in range(0, len(kept), REBUILT_TOGETHER):
            group = kept[first : first + REBUILT_TOGETHER]
            (visual_tokens,) = upload([torch.stack([tokens for _, tokens in group])], self._device)
            self._fill([encoding for encoding, _ in group], visual_tokens.to(self._pages.dtype))

    def _encode(self, pieces: Sequence[Piece], results: Downloads) -> None:
        by_length: dict[int, list[tuple[Encoding, Tensor]]] = defaultdict(list)
        for piece, features in self._encode_frames([piece for piece in pieces if piece.frames is not None], results):
            if piece.is_last:
                by_length[len(features)].append((piece.encoding, features))
            else:
                results.add([self._pool(features[None])], self._keep_pooled, [piece.encoding.key])
        for same_length in by_length.values():
            features = torch.stack([features for _, features in same_length])
            self._resample([encoding for encoding, _ in same_length], features, results)

    def _encode_frames(self, pieces: list[Piece], results: Downloads) -> Iterator[tuple[Piece, Tensor]]:
        """Encode the frames of these pieces; yield the features [F, P, Dv] of media whose last frame they have.

        The features of all but last pieces are kept.
        """
        clips = [piece.frames for piece in pieces if piece.count and piece.frames is not None]
        parts = iter(self.features(clips).split(list(map(len, clips))) if clips else ())
        begun: dict[bytes, list[Tensor]] = defaultdict(list)  # in this step
        for piece in pieces:
            encoding, new = piece.encoding, begun[piece.encoding.key]
            if piece.count:
                new.append(next(parts))
            if piece.has_last_frame:
                yield piece, torch.cat([*upload(encoding.features, self._device), *new])
            if piece.count and not piece.is_last:
                new[-1] = new[-1].clone()  # a view would keep the features of the whole step
                results.add(new[-1:], encoding.features.append)

    def _resample(self, encodings: list[Encoding], features: Tensor, results: Downloads) -> None:
        visual_tokens = self._model.resampler(features).to(self._pages.dtype)
        self._fill(encodings, visual_tokens)
        results.add([visual_tokens, self._pool(features)], self._keep, [encoding.key for encoding in encodings])

    def _keep(self, keys: list[bytes], visual_tokens: Tensor, pooled: Tensor) -> None:
        for key, tokens in zip(keys, visual_tokens, strict=True):
            if tokens.isfinite().all():
                self._media.host.put(key, tokens.clone())
            else:
                self._media.nonfinite.add(key)
        self._keep_pooled(keys, pooled)

    def _keep_pooled(self, keys: list[bytes], pooled: Tensor) -> None:
        for key, vector in zip(keys, pooled.numpy(), strict=True):
            if np.isfinite(vector).all():
                self._media.pooled.put(key, vector.copy())
            else:
                self._media.nonfinite.add(key)

    def _pool(self, features: Tensor) -> Tensor:
        """Pool the features without their kin, which likeness computes by itself."""
        return pool(features[..., : self._model.config.vision.feature_dim])

    def features(self, clips: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Frames [f, h, w, 3] of any number of media, F in all -> [F, P, Dv]."""
        (frames,) = upload([torch.from_numpy(np.concatenate(clips))], self._device)
        pixels = normalise(frames, self._model.config.vision).to(self._pixel_dtype)
        return self._model.features(pixels[:, None])[:, 0]

    def _fill(self, encodings: list[Encoding], visual_tokens: Tensor) -> None:
        slots = {i: encoding.slot for i, encoding in enumerate(encodings) if encoding.slot is not None}
        if slots:
            (rows,) = upload([torch.tensor([*slots])], self._device)
            self.fill([*slots.values()], visual_tokens[rows])

    def fill(self, slots: list[int], visual_tokens: Tensor) -> None:
        """Project visual tokens [M, R, D] to their pages, in these slots."""
        self._followers.fill_pages(slots, visual_tokens)
        (targets,) = upload([torch.tensor(slots)], self._device)
        self._pages[targets] = self._project(visual_tokens)


def pool(features: Tensor) -> Tensor:
    """Features [M, F, P, Dv] -> [M, Dv]: their mean over frames and patches."""
    return features.float().mean((1, 2))


def unit(vectors: Tensor) -> NDArray[np.float32]:
    """Scale vectors [N, D] to length one; a vector of zeros stays zero."""
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()


def _last_of_each_slot(pieces: Sequence[Piece]) -> list[Piece]:
    """Drop encodings into slots that were reassigned within one plan: the last one owns the slot."""
    owner = {piece.encoding.slot: piece.encoding for piece in pieces}
    return [p for p in pieces if p.encoding.slot is None or owner[p.encoding.slot] is p.encoding]
