"""Policies that choose a replica for a request: by affinity to its support set, or without regard to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, inf
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deploy.ray.affinity import FREE_REQUESTS, MAX_LOAD, preferred

NUM_FIRSTS = 16
NO_REPLICA = np.array([0])
GOLDEN, SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03)
FIRST_MIX, SECOND_MIX = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


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
        return self._alive[hashes_of(support_set, NO_REPLICA).item() % len(self._alive)]


class Affinity:
    """Rendezvous hashing with bounded loads: the rule of `deploy.ray.affinity`, with hashes that numpy computes.

    A support set prefers the replicas in an order of its own, and takes the first one that has less than `factor` times the
    mean load, or fewer than `num_free` requests. If a replica leaves, only its own sets move.
    """

    def __init__(self, rng: np.random.Generator, factor: float = MAX_LOAD, num_free: int = FREE_REQUESTS) -> None:
        self._factor = factor
        self._num_free = num_free
        self._alive = np.arange(0)
        self._firsts: dict[int, list[int]] = {}  # the beginnings of orders
        self._orders: dict[int, list[int]] = {}  # of sets that needed more

    def set_alive(self, replicas: Sequence[int]) -> None:
        self._alive = np.array(replicas)
        self._firsts.clear()
        self._orders.clear()

    def choose(self, support_set: int, loads: Sequence[int]) -> int:
        limit = inf
        if self._factor != inf:
            limit = max(ceil(self._factor * (sum(loads) + 1) / len(self._alive)), self._num_free)
        firsts = self._firsts.get(support_set)
        if firsts is None:
            firsts = self._firsts[support_set] = self.order(support_set)[:NUM_FIRSTS]
        replica = first_with_room(firsts, loads, limit)
        return self._choose_later(support_set, loads, limit) if replica is None else replica

    def order(self, support_set: int) -> list[int]:
        """Return the replicas that are alive, in the order of a support set's preference."""
        order: list[int] = self._alive[np.argsort(hashes_of(support_set, self._alive))].tolist()
        return order

    def _choose_later(self, support_set: int, loads: Sequence[int], limit: float) -> int:
        order = self._orders.get(support_set)
        if order is None:
            order = self._orders[support_set] = self.order(support_set)
        replica = first_with_room(order, loads, limit)
        return min(order, key=loads.__getitem__) if replica is None else replica


class Deployed:
    """Chooses as the deployment on Ray does, by its own function; the names of the support sets differ with the seed."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._seed = rng.integers(2**32)
        self._alive: Sequence[int] = ()

    def set_alive(self, replicas: Sequence[int]) -> None:
        self._alive = replicas

    def choose(self, support_set: int, loads: Sequence[int]) -> int:
        by_name = {f"replica {replica}": loads[replica] for replica in self._alive}
        name = preferred(f"set {self._seed} {support_set}", by_name)[0]
        return int(name.removeprefix("replica "))


def first_with_room(order: Sequence[int], loads: Sequence[int], limit: float) -> int | None:
    return next((replica for replica in order if loads[replica] < limit), None)


def hashes_of(support_set: int, replicas: NDArray[Any]) -> NDArray[np.uint64]:
    """Return a hash of a support set and each replica, by the finalizer of SplitMix64."""
    key = np.array([support_set + 1], dtype=np.uint64)
    value = key * GOLDEN ^ (replicas.astype(np.uint64) + np.uint64(1)) * SECOND
    for shift, factor in ((30, FIRST_MIX), (27, SECOND_MIX)):
        value = (value ^ (value >> np.uint64(shift))) * factor
    return value ^ (value >> np.uint64(31))
