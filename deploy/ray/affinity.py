"""Chooses the replica of a request: rendezvous hashing with bounded loads, by a key that similar requests share.

Requests with the same key go to the same replica, whose caches then hold their pictures and prompts. When a replica leaves,
only its own keys move; a new one takes an equal share from each. If a replica is busier than the others, the next request
goes to the key's second choice (bounded loads: Mirrokni, Thorup and Zadimoghaddam, 2018). Standard library only.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# a replica has at most this multiple of the mean number of requests
MAX_LOAD = 1.25
# a replica with at most this number of requests is never too busy: a cache miss costs more than to wait in its batch
FREE_REQUESTS = 2

SET_PATH = re.compile(r"/v1/support_sets/([^/]+)")
# fields that contain media as text, and the field of a request that differs between requests
URL_FIELDS = frozenset({"url", "image", "video", "media", "uuid", "image_id", "video_id"})
QUERY = "query"


def ranked(key: str, replicas: Sequence[str]) -> list[str]:
    """Return the replicas in the key's order of preference, which is the order of the hashes of key and replica."""
    return sorted(replicas, key=lambda replica: hashlib.blake2b(f"{key}\0{replica}".encode()).digest())


def bound(loads: Mapping[str, int]) -> int:
    """Return the number of requests at which a replica gets no more while others have fewer."""
    mean = (sum(loads.values()) + 1) / len(loads)
    return max(FREE_REQUESTS, math.ceil(MAX_LOAD * mean))


def preferred(key: str, loads: Mapping[str, int]) -> list[str]:
    """Return the replicas in the order in which to try them: the key's order, but those that are too busy last."""
    limit, order = bound(loads), ranked(key, list(loads))
    return [r for r in order if loads[r] < limit] + sorted(
        (r for r in order if loads[r] >= limit), key=loads.__getitem__
    )


def affinity_key(path: str, body: Mapping[str, Any] | None) -> str | None:
    """Return the key that requests with the same examples share: their support set, or one of their pictures.

    It is the picture with the smallest hash among those of the prompt, without the query's. So the probability that two
    prompts have the same key is the share of pictures that they have in common (MinHash). None: there are no pictures.
    """
    if (match := SET_PATH.match(path)) is not None and match[1] != "import":
        return match[1]
    if body is None:
        return None
    if (name := next(_values(body, {"support_set"}), None)) is not None:
        return name
    if path == "/v1/support_sets" and isinstance(body.get("name"), str):
        return str(body["name"])
    return min(map(_digest, _shots(body)), default=None)


def _shots(body: Mapping[str, Any]) -> list[str]:
    """Return the media of the shots: all except those of the field `query`, or else except the last of several."""
    media = list(_media({name: value for name, value in body.items() if name != QUERY}))
    if QUERY in body:
        return media or list(_media(body))
    return media[:-1] or media


def _media(body: Any) -> Iterator[str]:
    """Yield the media in a body, as their data URLs, names or ids, in its order."""
    return (text for text in _values(body, URL_FIELDS) if text)


def _values(value: Any, names: frozenset[str] | set[str]) -> Iterator[str]:
    """Yield the texts in fields with one of these names, at any depth, in the order of the body."""
    # not by recursion: a body may have as many levels as the parser permits
    left: list[tuple[str, Any]] = [("", value)]
    while left:
        name, value = left.pop()
        match value:
            case str():
                if name in names:
                    yield value
            case {"uuid": str(named)} if "uuid" in names:  # with or without the data
                yield named
            case dict():
                left += reversed(value.items())
            case list():
                left += ((name, inner) for inner in reversed(value) if not isinstance(inner, int | float))


def _digest(media: str) -> str:
    return hashlib.blake2b(media.encode(errors="surrogatepass"), digest_size=16).hexdigest()
