"""Ray's request router for replicas: it chooses by the model first, then by the key of the request, then by the load.

Each gateway has its own router. It counts its own requests, and learns the load by other gateways from the replicas, which
report their number of requests with each request that they accept.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from ray.serve.request_router import (
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from deploy.ray.affinity import preferred
from deploy.ray.call import Call, Routing


class AffinityRouter(MultiplexMixin, RequestRouter):
    """Sends requests with one key to one replica, within bounded loads; those without a key to the less busy of two."""

    def initialize_state(self, **_: Any) -> None:
        self._running: defaultdict[ReplicaID, set[str]] = defaultdict(set)
        self._turns = itertools.count()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas to try, one per rank."""
        if pending_request is None:
            return [[replica] for replica in candidate_replicas]
        # otherwise Ray would call this again without a pause while all replicas are full
        pending_request.routing_context.should_backoff = True
        call = next((argument for argument in pending_request.args if isinstance(argument, Call)), None)
        groups = self.rank_replicas_via_multiplex(candidate_replicas, pending_request.metadata.multiplexed_model_id)
        ordered = [replica for group in self._sorted(groups, call) for replica in group]
        return [[replica] for replica in ordered]

    def _sorted(self, groups: list[list[RunningReplica]], call: Call | None) -> Iterator[list[RunningReplica]]:
        """Yield each group sorted, replicas with the model first: others load it only if these accept no more requests."""
        routing: Routing = "affinity" if call is None else call.routing
        for group in groups:
            by_id = {replica.replica_id.unique_id: replica for replica in group if not self._is_avoided(replica, call)}
            if by_id:
                loads = {name: self._load(replica.replica_id) for name, replica in by_id.items()}
                yield [by_id[name] for name in self._order(routing, call, loads)]
        yield [replica for group in groups for replica in group if self._is_avoided(replica, call)]

    def _order(self, routing: Routing, call: Call | None, loads: Mapping[str, int]) -> list[str]:
        names = list(loads)
        match routing:
            case "random":
                random.shuffle(names)
                return names
            case "round_robin":
                first = next(self._turns) % len(names)
                return sorted(names)[first:] + sorted(names)[:first]
            case "affinity" if call is not None and call.key is not None:
                return preferred(call.key, loads)
        random.shuffle(names)
        return sorted(names[:2], key=loads.__getitem__) + names[2:]

    def _is_avoided(self, replica: RunningReplica, call: Call | None) -> bool:
        return call is not None and replica.replica_id.unique_id in call.avoid

    def _load(self, replica_id: ReplicaID) -> int:
        """Return the known number of requests of a replica."""
        reported = self.replica_queue_len_cache.get(replica_id) or 0
        return max(reported, len(self._running.get(replica_id, ())))

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._running[replica_id].add(pending_request.metadata.internal_request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._running[replica_id].discard(internal_request_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._running.pop(replica_id, None)
