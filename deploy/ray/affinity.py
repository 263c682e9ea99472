"""The choice of a replica: rendezvous hashing with bounded loads, and the key that requests share.

Requests with one key go to one replica, whose caches then hold their pictures and prompts. When a replica leaves, only its
own keys move; when one joins, it takes an equal share from each. A replica that is busier than the others gives its next
request to the second choice of the key (bounded loads: Mirrokni, Thorup and Zadimoghaddam, 2018). Standard library only.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# a replica has at most this multiple of the mean number of requests
MAX_LOAD = 1.25
# as many requests at once are never too many for a replica: a miss costs more than to wait in its batch
FREE_REQUESTS = 2

SET_PATH = re.compile(r"/v1/support_sets/([^/]+)")
# fields that hold media as text, and the part of a request that no other one shares
URL_FIELDS = frozenset({"url", "image", "video", "media", "uuid", "image_id", "video_id"})
QUERY = "query"


def ranked(key: str, replicas: Sequence[str]) -> list[str]:
    """Return the replicas in the key's order of preference: that of the hashes of key and replica."""
    return sorted(replicas, key=lambda replica: hashlib.blake2b(f"{key}\0{replica}".encode()).digest())


def bound(loads: Mapping[str, int]) -> int:
    """Return the number of requests from which on a replica gets no more while others have fewer."""
    mean = (sum(loads.values()) + 1) / len(loads)
    return max(FREE_REQUESTS, math.ceil(MAX_LOAD * mean))


def preferred(key: str, loads: Mapping[str, int]) -> list[str]:
    """Return the replicas to try in turn: the key's own order, but those that are too busy last."""
    limit, order = bound(loads), ranked(key, list(loads))
    return [r for r in order if loads[r] < limit] + sorted(
        (r for r in order if loads[r] >= limit), key=loads.__getitem__
    )


def affinity_key(path: str, body: Mapping[str, Any] | None) -> str | None:
    """Return the key that requests with the same examples share: their support set, or one of their pictures.

    Of the pictures in a prompt it is the one with the smallest hash, without the query's. So two prompts have the same key
    with a probability that is the part of their pictures that they share (MinHash). None: a request without pictures.
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
    """Return the media of the shots: all but those of the field `query`, or else but the last. Of one alone, it."""
    media = list(_media({name: value for name, value in body.items() if name != QUERY}))
    if QUERY in body:
        return media or list(_media(body))
    return media[:-1] or media


def _media(body: Any) -> Iterator[str]:
    """Yield the media in a body, as their data URLs, names or ids, in its order."""
    return (text for text in _values(body, URL_FIELDS) if text)


def _values(value: Any, names: frozenset[str] | set[str], name: str = "") -> Iterator[str]:
    """Yield the texts in fields with one of these names, at any depth."""
    match value:
        case str():
            if name in names:
                yield value
        case {"uuid": str(named)} if "uuid" in names:  # with or without the data
            yield named
        case Mapping():
            for field, inner in value.items():
                yield from _values(inner, names, field)
        case list():
            for inner in value:
                yield from _values(inner, names, name)


def _digest(media: str) -> str:
    return hashlib.blake2b(media.encode(errors="surrogatepass"), digest_size=16).hexdigest()
