"""Policies that choose a replica for a request: by affinity to its support set, or without regard to it."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from hashlib import blake2b
from math import ceil, inf
from typing import Protocol

import numpy as np

NUM_POINTS = 100


class Policy(Protocol):
    """Chooses among the replicas that are alive, by number."""

    def set_alive(self, replicas: Sequence[int]) -> None:
        """Note which replicas can be chosen from now on."""
        ...

    def choose(self, support_set: int, loads: Sequence[int]) -> int:
        """Return a replica for a request; `loads` counts the unfinished requests of each replica, by number."""
        ...


MakePolicy = Callable[[np.random.Generator], Policy]


class Random:
    """Chooses any replica."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._alive: Sequence[int] = ()

    def set_alive(self, replicas: Sequence[int]) -> None:
        self._alive = replicas

    def choose(self, support_set: int, loads: Sequence[int]) -> int:
        return self._alive[int(self._rng.random() * len(self._alive))]


class RoundRobin:
    """Chooses the replicas in turn."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._alive: Sequence[int] = ()
        self._next = 0

    def set_alive(self, replicas: Sequence[int]) -> None:
        self._alive = replicas

    def choose(self, support_set: int, loads: Sequence[int]) -> int:
        self._next = (self._next + 1) % len(self._alive)
        return self._alive[self._next]


class Modulo:
    """Chooses by the hash of the support set, modulo the number of replicas."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._alive: Sequence[int] = ()

    def set_alive(self, replicas: Sequence[int]) -> None:
        self._alive = replicas

    def choose(self, support_set: int, loads: Sequence[int]) -> int:
        return self._alive[hash_of(f"set-{support_set}") % len(self._alive)]


class Affinity:
    """Consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018).

    Each replica has points on a ring. A support set belongs to the replica of the next point; if that one has as much as
    `factor` times the mean load, to the next replica on the ring that has not. If a replica leaves, only its own sets move.
    """

    def __init__(self, rng: np.random.Generator, factor: float = 1.25) -> None:
        self._factor = factor
        self._hashes: list[int] = []
        self._owners: list[int] = []
        self._num_alive = 0
        self._starts: dict[int, int] = {}

    def set_alive(self, replicas: Sequence[int]) -> None:
        points = sorted((point, replica) for replica in replicas for point in points_of(replica))
        self._hashes, self._owners = [point for point, _ in points], [replica for _, replica in points]
        self._num_alive = len(replicas)
        self._starts.clear()

    def choose(self, support_set: int, loads: Sequence[int]) -> int:
        start = self._starts.get(support_set)
        if start is None:
            start = self._starts[support_set] = bisect(self._hashes, hash_of(f"set-{support_set}"))
        limit = inf if self._factor == inf else ceil(self._factor * (sum(loads) + 1) / self._num_alive)
        owners, count = self._owners, len(self._owners)
        return next(owner for i in range(count) if loads[owner := owners[(start + i) % count]] < limit)


def points_of(replica: int) -> list[int]:
    return [hash_of(f"replica-{replica} {number}") for number in range(NUM_POINTS)]


def hash_of(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
