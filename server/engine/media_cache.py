"""Where media live in the worker: pages on the device, visual tokens in host memory, frames that wait to be encoded.

Two digests a media. The *source* digest is of the encoded bytes as the client sent them; a hit on it decodes nothing. The
*key* is of the decoded frames, their shape, the preprocessing and the weights: two encodings of one picture share a slot.
A miss anywhere is answered by asking again (`wanted`), never by an error.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

MAX_ALIASES = 1 << 20
MAX_POOLED = 1 << 12


@dataclass(frozen=True, slots=True)
class Encoding:
    """One media to bring into its slot: from frames (uint8 [F, h, w, 3]) or from visual tokens kept on the host. No slot:
    its features are wanted, and its page is not."""

    key: bytes
    slot: int | None
    frames: np.ndarray | None
    visual_tokens: Tensor | None


def content_key(frames: np.ndarray, salt: bytes) -> bytes:
    """256-bit key of decoded frames; `salt` names the preprocessing and the weights."""
    digest = hashlib.blake2b(
        digest_size=32, person=b"flmbynce-media", salt=hashlib.blake2b(salt, digest_size=16).digest()
    )
    digest.update(np.asarray(frames.shape, dtype=np.int64).tobytes() + frames.dtype.str.encode())
    digest.update(np.ascontiguousarray(frames).data)
    return digest.digest()


class HostTier:
    """Visual tokens [R, D] by key, least recently used out first, at most `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._tokens: OrderedDict[bytes, Tensor] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._tokens

    def get(self, key: bytes) -> Tensor | None:
        if key in self._tokens:
            self._tokens.move_to_end(key)
        return self._tokens.get(key)

    def put(self, key: bytes, tokens: Tensor) -> None:
        if key in self._tokens:
            return
        self._tokens[key] = tokens
        self.num_bytes += tokens.nbytes
        while self.num_bytes > self.max_bytes:
            _, dropped = self._tokens.popitem(last=False)
            self.num_bytes -= dropped.nbytes

    def discard(self, key: bytes) -> None:
        if (dropped := self._tokens.pop(key, None)) is not None:
            self.num_bytes -= dropped.nbytes


class PooledFeatures:
    """Vectors [Dv] float32 of length one by key, least recently used out first, at most `max_entries`."""

    def __init__(self, max_entries: int) -> None:
        self.max_entries = max_entries
        self._vectors: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._vectors

    def get(self, key: bytes) -> NDArray[np.float32] | None:
        if key in self._vectors:
            self._vectors.move_to_end(key)
        return self._vectors.get(key)

    def put(self, key: bytes, vector: NDArray[np.float32]) -> None:
        self._vectors[key] = vector
        self._vectors.move_to_end(key)
        if len(self._vectors) > self.max_entries:
            self._vectors.popitem(last=False)


class MediaSlots:
    """Slots of the device pool with reference counts; unreferenced ones stay filled until another media needs the room."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: dict[bytes, int] = {}
        self._references: dict[bytes, int] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()
        self._pinned: set[bytes] = set()
        self.num_evictions = 0

    @property
    def num_available(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def num_in_use(self) -> int:
        return len(self._references)

    @property
    def num_free(self) -> int:
        """Slots that nothing fills."""
        return len(self._free)

    def find(self, key: bytes) -> int | None:
        return self._slot_of.get(key)

    def acquire(self, key: bytes) -> int:
        """One more reference on a media that has a slot."""
        self._idle.pop(key, None)
        self._references[key] = self._references.get(key, 0) + 1
        return self._slot_of[key]

    def place(self, key: bytes) -> int:
        """A slot for a media that has none, taken from the free or the longest idle; with one reference."""
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

    def discard(self, key: bytes) -> None:
        """Forget a media that nobody holds."""
        self.unpin(key)
        if key in self._idle:
            del self._idle[key]
            self._free.append(self._slot_of.pop(key))

    @property
    def num_pinned(self) -> int:
        return len(self._pinned)

    def pin(self, key: bytes) -> bool:
        """Keep a media that has a slot, whoever else needs room. At most a quarter of the slots: False beyond."""
        if key in self._pinned:
            return True
        if key not in self._slot_of or self.num_pinned >= self.num_slots // 4:
            return False
        self._pinned.add(key)
        self.acquire(key)
        return True

    def unpin(self, key: bytes) -> None:
        if key in self._pinned:
            self._pinned.remove(key)
            self.release(key)


class MediaCache:
    """The worker's one owner of media. `salt` names preprocessing and weights; no torch task happens here."""

    def __init__(self, num_slots: int, host_bytes: int, salt: bytes) -> None:
        self.slots = MediaSlots(num_slots)
        self.host = HostTier(host_bytes)
        self.pooled = PooledFeatures(MAX_POOLED)
        self.nonfinite: set[bytes] = set()  # whose encoding was not finite, in this step
        self._salt = salt
        self._aliases: OrderedDict[bytes, bytes] = OrderedDict()
        self._frames: dict[bytes, np.ndarray] = {}
        self._wanted: set[bytes] = set()

    def key(self, source: bytes) -> bytes | None:
        """The content key of a source digest seen before."""
        if source in self._aliases:
            self._aliases.move_to_end(source)
        return self._aliases.get(source)

    def supply(self, source: bytes, frames: np.ndarray, *, for_page: bool = True, for_pooling: bool = False) -> None:
        """Frames that were wanted; they are kept until encoded, where something still lacks what they give."""
        key = content_key(frames, self._salt)
        self._wanted.discard(source)
        self._aliases[source] = key
        if len(self._aliases) > MAX_ALIASES:
            self._aliases.popitem(last=False)
        lacks_page = for_page and self.slots.find(key) is None and key not in self.host
        if lacks_page or (for_pooling and key not in self.pooled):
            self._frames[key] = frames

    def fail(self, source: bytes) -> None:
        self._wanted.discard(source)

    def is_encodable(self, key: bytes) -> bool:
        return key in self._frames or key in self.host

    def is_ready(self, key: bytes) -> bool:
        """Whether a token that reads this media could run now, given a slot."""
        return self.slots.find(key) is not None or self.is_encodable(key)

    def num_cached(self, keys: Iterable[bytes]) -> int:
        """How many different media of these need no pixels."""
        return sum(self.slots.find(key) is not None or key in self.host for key in set(keys))

    def want(self, sources: Iterable[bytes]) -> list[bytes]:
        """Of these sources, those that nobody has been asked for yet; they count as asked from now on."""
        new = [source for source in dict.fromkeys(sources) if source not in self._wanted]
        self._wanted.update(new)
        return new

    def begin_encoding(self, key: bytes) -> Encoding:
        """Place a media that has no slot; its frames are handed over, unless there are visual tokens already."""
        visual_tokens = self.host.get(key)
        frames = None if visual_tokens is not None else self._frames.pop(key, None)
        return Encoding(key, self.slots.place(key), frames, visual_tokens)

    def has_frames(self, key: bytes) -> bool:
        return key in self._frames

    def begin_pooling(self, key: bytes) -> Encoding:
        """Encode a media for its features; its frames are handed over. What they also give stays for prompts: in host
        memory, and in a slot that is free, or any that is not held where host memory keeps nothing."""
        frames = self._frames.pop(key)
        is_placed = self.slots.find(key) is not None or key in self.host
        room = self.slots.num_free if self.host.max_bytes else self.slots.num_available
        return Encoding(key, None if is_placed or not room else self.slots.place(key), frames, None)

    def discard(self, keys: Iterable[bytes]) -> None:
        """Forget what was computed of these media, where nobody holds them: it may be no good."""
        for key in keys:
            self.slots.discard(key)
            self.host.discard(key)

    def num_frames(self, key: bytes) -> int:
        """What encoding this media costs in frames; visual tokens from the host cost none."""
        return 0 if key in self.host else self.num_frames_of(key)

    def num_frames_of(self, key: bytes) -> int:
        return len(self._frames[key])

    def forget_frames(self, still_needed: set[bytes]) -> None:
        """Drop frames that no sequence waits for."""
        for key in self._frames.keys() - still_needed:
            del self._frames[key]
