"""Ranks of a divided model in the threads of one process, which gloo connects as it does processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from model.parallel import Group, ProcessGroup
from model.ranks import Rank

Result = TypeVar("Result")
# after which a rank that waits for one that failed fails too
TIMEOUT = timedelta(seconds=30)


def gloo(store: Any, rank: Rank) -> Group:
    return ProcessGroup(dist.ProcessGroupGloo(store, rank.number, rank.size, TIMEOUT))


def in_ranks(size: int, function: Callable[[Rank, Group], Result]) -> list[Result]:
    """Call a function in each rank, and return the results in their order."""
    store = dist.HashStore()  # type: ignore[attr-defined]

    def run(number: int) -> Result:
        rank = Rank(number, size)
        return function(rank, gloo(store, rank))

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))
