"""The engine's cache of media, from frames to pages on the device.

A media item has two names. The *source* is the digest of the encoded bytes as the client sent them, followed by the salt of
the request; a hit on it decodes nothing. The *key* is the digest of the decoded frames, their shape, the preprocessing, the
weights and the salt: two encodings of one image share a slot. After a miss the pixels are requested again; a miss is never
an error.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from server.lru_cache import LruCache

# of a source, before the salt
SOURCE_BYTES = 32
MAX_SOURCES = 1 << 20
MAX_POOLED = 1 << 12


@dataclass(slots=True, eq=False)
class Encoding:
    """A media item to encode: from frames (uint8 [F, h, w, 3]), or from visual tokens that are kept on the host.

    Steps take the frames in pieces. The last piece completes the media item: its features become visual tokens and, with a
    slot, a page. It has the last frames or none. The features [f, P, Dv] of earlier pieces are kept on the host.
    """

    key: bytes
    frames: np.ndarray | None = None
    visual_tokens: Tensor | None = None
    slot: int | None = None
    num_taken: int = 0  # frames that steps have taken
    features: list[Tensor] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return 0 if self.frames is None else len(self.frames) - self.num_taken

    @property
    def awaits_completion(self) -> bool:
        """True if it has frames, and steps have taken all of them; the cache drops it with its last piece."""
        return self.frames is not None and not self.num_left

    def next_piece(self, num_frames: int, *, completes: bool = True) -> Piece:
        """Return a piece of the next frames; with the last ones, it is the last piece if it `completes` the media item."""
        piece = Piece(self, self.num_taken, num_frames, is_last=completes and num_frames == self.num_left)
        self.num_taken += num_frames
        return piece


@dataclass(frozen=True, slots=True)
class Piece:
    """One step's part of an encoding: `count` frames from `start`. The last piece may have no frames."""

    encoding: Encoding
    start: int
    count: int
    is_last: bool

    @property
    def frames(self) -> np.ndarray | None:
        frames = self.encoding.frames
        return None if frames is None else frames[self.start : self.start + self.count]

    @property
    def has_last_frame(self) -> bool:
        frames = self.encoding.frames
        return frames is not None and self.start + self.count == len(frames)


def content_key(frames: np.ndarray, salt: bytes) -> bytes:
    """Return the 256-bit key of decoded frames; `salt` names the preprocessing and the weights."""
    digest = hashlib.blake2b(
        digest_size=32, person=b"flmbynce-media", salt=hashlib.blake2b(salt, digest_size=16).digest()
    )
    digest.update(np.asarray(frames.shape, dtype=np.int64).tobytes() + frames.dtype.str.encode())
    digest.update(np.ascontiguousarray(frames).data)
    return digest.digest()


class MediaSlots:
    """Slots for media pages, with reference counts; one without stays filled until another media item needs it."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: dict[bytes, int] = {}
        self._references: dict[bytes, int] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()
        self._pinned: set[bytes] = set()
        self._discarded: set[bytes] = set()  # media that leave their slots with their last references
        self.num_evictions = 0

    @property
    def num_available(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def num_in_use(self) -> int:
        return len(self._references)

    @property
    def num_free(self) -> int:
        """Slots that are not filled."""
        return len(self._free)

    @property
    def num_pinned(self) -> int:
        return len(self._pinned)

    def find(self, key: bytes) -> int | None:
        return self._slot_of.get(key)

    def acquire(self, key: bytes) -> int:
        """Add a reference to a media item that has a slot."""
        self._idle.pop(key, None)
        self._references[key] = self._references.get(key, 0) + 1
        return self._slot_of[key]

    def assign(self, key: bytes) -> int:
        """Assign a slot, free or longest idle, with one reference, to a media item that has none."""
        if not self._free:
            evicted, _ = self._idle.popitem(last=False)
            self._free.append(self._slot_of.pop(evicted))
            self.num_evictions += 1
        self._slot_of[key] = self._free.pop()
        self._references[key] = 1
        return self._slot_of[key]

    def release(self, key: bytes) -> None:
        self._references[key] -= 1
        if not self._references[key]:
            del self._references[key]
            self._idle[key] = None
            if key in self._discarded:
                self._discarded.remove(key)
                self.discard(key)

    def discard(self, key: bytes) -> None:
        """Empty the slot of a media item, once it has no references."""
        self.unpin(key)
        if key in self._idle:
            del self._idle[key]
            self._free.append(self._slot_of.pop(key))
        elif key in self._references:
            self._discarded.add(key)

    def pin(self, key: bytes) -> None:
        """Keep a media item in its slot, if it has one, and if less than a quarter of all slots is pinned."""
        if key not in self._pinned and key in self._slot_of and self.num_pinned < self.num_slots // 4:
            self._pinned.add(key)
            self.acquire(key)

    def unpin(self, key: bytes) -> None:
        if key in self._pinned:
            self._pinned.remove(key)
            self.release(key)


class MediaCache:
    """The only owner of the worker's media. `salt` names the preprocessing and the weights.

    The features of at most `max_kept_frames` frames, and those of one more media item, wait for the item's last piece.
    """

    def __init__(self, num_slots: int, host_bytes: int, salt: bytes, max_kept_frames: int = 256) -> None:
        self.slots = MediaSlots(num_slots)
        self.content_keys: LruCache[bytes, bytes] = LruCache(MAX_SOURCES)  # by source, once it was supplied
        self.host: LruCache[bytes, Tensor] = LruCache(host_bytes, lambda tokens: tokens.nbytes)  # visual tokens [R, Dv]
        self.pooled: LruCache[bytes, NDArray[np.float32]] = LruCache(MAX_POOLED)  # mean features [Dv]
        self.nonfinite: set[bytes] = set()  # keys whose encoding in this step was not finite
        self._salt = salt
        self._max_kept_frames = max_kept_frames
        self._encodings: dict[bytes, Encoding] = {}  # from frames, with pieces that no step has taken yet
        self._requested: set[bytes] = set()
        self.num_host_hits = 0  # pages from visual tokens in host memory
        self.num_joins = 0  # requests for a source that another request had already requested

    def request(self, sources: Sequence[bytes], *, is_first: bool = False) -> list[bytes]:
        """Return the sources that have not been requested yet, and note that they now are.

        `is_first`: a new request needs them, so those that others have requested are counted.
        """
        if is_first:
            self.num_joins += len(self._requested.intersection(sources))
        new = [source for source in dict.fromkeys(sources) if source not in self._requested]
        self._requested.update(new)
        return new

    def supply(self, source: bytes, frames: np.ndarray, *, for_page: bool = True, for_pooling: bool = False) -> None:
        """Receive requested frames; they are kept until encoded, if the page or the features are still missing."""
        key = content_key(frames, self._salt + source[SOURCE_BYTES:])
        self._requested.discard(source)
        self.content_keys.put(source, key)
        lacks_page = for_page and not self._is_encoded(key)
        if lacks_page or (for_pooling and key not in self.pooled):
            self._encodings.setdefault(key, Encoding(key, frames))

    def fail(self, source: bytes) -> None:
        self._requested.discard(source)

    def has_frames(self, key: bytes) -> bool:
        return key in self._encodings

    def is_encodable(self, key: bytes) -> bool:
        return key in self._encodings or key in self.host

    def is_ready(self, key: bytes) -> bool:
        """Return whether a token that reads this media item could run now, given a slot."""
        return self.slots.find(key) is not None or self.is_encodable(key)

    def num_cached(self, keys: Iterable[bytes]) -> int:
        """Return the number of different media among these that need no pixels."""
        return sum(self._is_encoded(key) or self._awaits_completion(key) for key in set(keys))

    def encode(self, key: bytes, max_frames: int, *, is_last_resort: bool = False) -> Piece | None:
        """Return the next piece of a page's encoding, from visual tokens if they are kept; None if it has to wait.

        With the last piece, the media item gets a slot.
        """
        visual_tokens = self.host.get(key)
        encoding = self._encodings[key] if visual_tokens is None else Encoding(key, visual_tokens=visual_tokens)
        if not self.slots.num_available:
            return None
        piece = self._piece_within(encoding, max_frames, is_last_resort=is_last_resort)
        if piece is not None and piece.is_last:
            encoding.slot = self.slots.assign(key)
            self.num_host_hits += visual_tokens is not None
            if visual_tokens is None:
                del self._encodings[key]
        return piece

    def encode_for_pooling(self, key: bytes, max_frames: int) -> Piece | None:
        """Return the next frames of a media item, to encode for its features; None if it has to wait.

        It is completed later, by `complete`.
        """
        return self._piece_within(self._encodings[key], max_frames, completes=False)

    def complete(self) -> list[Piece]:
        """Return the last pieces of media that earlier steps have encoded for their features.

        Their visual tokens are kept in host memory, and in a slot that is free or, without host memory, not in use. Media
        with neither are dropped.
        """
        waiting = [encoding for encoding in self._encodings.values() if encoding.awaits_completion]
        for encoding in waiting:
            del self._encodings[encoding.key]
        lacking = [encoding for encoding in waiting if not self._is_encoded(encoding.key)]
        num_slots = self.slots.num_free if self.host.max_size else self.slots.num_available
        for encoding in lacking[:num_slots]:
            encoding.slot = self.slots.assign(encoding.key)
        for encoding in lacking[:num_slots]:
            self.slots.release(encoding.key)
        kept = lacking if self.host.max_size else lacking[:num_slots]
        return [encoding.next_piece(0) for encoding in kept]

    @property
    def has_incomplete(self) -> bool:
        """True if media wait for `complete`."""
        return any(encoding.awaits_completion for encoding in self._encodings.values())

    def _piece_within(
        self, encoding: Encoding, max_frames: int, *, is_last_resort: bool = False, completes: bool = True
    ) -> Piece | None:
        """Return the next piece, of at most `max_frames` frames; None if it has to wait."""
        num_left = encoding.num_left
        count = min(num_left, max_frames)
        if count < num_left and not (count and (is_last_resort or self._may_keep_features(encoding))):
            return None
        return encoding.next_piece(count, completes=completes)

    def _may_keep_features(self, encoding: Encoding) -> bool:
        """Return whether there is room for features. One encoding may always begin and continue."""
        begun = [other for other in self._encodings.values() if other.num_taken]
        return not begun or encoding in begun[:1] or sum(other.num_taken for other in begun) < self._max_kept_frames

    def discard(self, keys: Iterable[bytes]) -> None:
        """Drop the visual tokens and pages of media, which may be wrong; pages only once they have no references."""
        for key in keys:
            self.slots.discard(key)
            self.host.discard(key)
            self._encodings.pop(key, None)

    def forget_frames(self, still_needed: set[bytes]) -> None:
        """Drop the frames, and the features so far, of media that no request waits for, unless `complete` needs them."""
        for key in self._encodings.keys() - still_needed:
            if not self._encodings[key].awaits_completion:
                del self._encodings[key]

    def _awaits_completion(self, key: bytes) -> bool:
        return key in self._encodings and self._encodings[key].awaits_completion

    def _is_encoded(self, key: bytes) -> bool:
        return self.slots.find(key) is not None or key in self.host
