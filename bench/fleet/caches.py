"""The caches of a simulated replica, with the engine's rule: the least recently used entry is dropped first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass


class PartialLru:
    """A cache of entries that consist of equal parts: pages of a support set, or tokens of its text.

    If space is needed, the least recently used entry loses parts, not all of them at once, as the engine's entries do.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        self._parts: OrderedDict[Hashable, int] = OrderedDict()

    def touch(self, key: Hashable, num_parts: int) -> int:
        """Use the first parts of an entry, which are in the cache afterwards; return how many were not in it."""
        present = self._parts.pop(key, 0)
        num_missing = max(num_parts - present, 0)
        self._parts[key] = present + num_missing
        self.size += num_missing
        if self.size > self.capacity:
            self._evict()
        return num_missing

    def present(self, key: Hashable) -> int:
        """Return how many parts of an entry are in the cache, without using it."""
        return self._parts.get(key, 0)

    def clear(self) -> None:
        self._parts.clear()
        self.size = 0

    def _evict(self) -> None:
        parts, excess = self._parts, self.size - self.capacity
        while excess > 0:
            key, present = parts.popitem(last=False)
            excess -= present
        if excess < 0:  # the last one that was dropped stays in part
            parts[key] = -excess
            parts.move_to_end(key, last=False)
        self.size = self.capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSizes:
    """The sizes of a replica's caches: pages of media, media whose visual tokens are in host memory, and tokens of text."""

    pages: int
    host: int
    tokens: int

    def scaled(self, factor: float) -> CacheSizes:
        return CacheSizes(
            pages=round(self.pages * factor), host=round(self.host * factor), tokens=round(self.tokens * factor)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The size of a request: its shots, the tokens of a shot, of the query and of the answer."""

    shots: int
    shot_tokens: int
    query_tokens: int
    new_tokens: int

    @property
    def set_tokens(self) -> int:
        return self.shots * self.shot_tokens


@dataclass(frozen=True, slots=True)
class Misses:
    """The cache misses of a support set: tokens, images to encode, and pages to compute from visual tokens.

    `absent` counts the images that no cache has, needed or not, as the server's usage does.
    """

    tokens: int = 0
    encoded: int = 0
    rebuilt: int = 0
    absent: int = 0


class Caches:
    """The three caches of an engine.

    A prompt whose text is cached needs no page of its shots, since only the text after the cached prefix reads media. A
    page that is missing is computed from visual tokens in host memory, or else its image is encoded.
    """

    def __init__(self, sizes: CacheSizes, shape: Shape) -> None:
        self.shape = shape
        self.pages = PartialLru(sizes.pages)
        self.host = PartialLru(sizes.host)
        self.text = PartialLru(sizes.tokens)

    def use(self, support_set: int, query: int) -> Misses:
        """Use the shots of a support set, then the image and the text of a query that was never seen."""
        new = -1 - query
        self.text.touch(new, self.shape.query_tokens + self.shape.new_tokens)  # the first that leaves
        misses = self._use_shots(support_set)
        self.pages.touch(new, 1)
        self.host.touch(new, 1)
        return misses

    def clear(self) -> None:
        for cache in (self.pages, self.host, self.text):
            cache.clear()

    def _use_shots(self, support_set: int) -> Misses:
        shape = self.shape
        absent = shape.shots - max(self.pages.present(support_set), self.host.present(support_set))
        num_tokens = self.text.touch(support_set, shape.set_tokens)
        if not num_tokens:
            return Misses(absent=absent)
        num_images = -(-num_tokens // shape.shot_tokens)
        num_pages = self.pages.touch(support_set, num_images)
        encoded = min(self.host.touch(support_set, num_images), num_pages) if num_pages else 0
        return Misses(num_tokens, encoded, num_pages - encoded, absent)
