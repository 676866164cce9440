"""Ray's part of the routing: a call goes to the first of the replicas that its caller names that accepts it.

The front chooses (:mod:`.routing`), since it knows the load without asking: Ray's own prefix-aware router is compared
with it in docs/scaling.md. Ray pickles this module by value, with all that it defines, so state is in :mod:`.members`.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from trunkline.core.cluster import members

REPLICAS = "replicas"  # the keyword argument of a call: names of the replicas that may take it, best first


class NamedReplicas(RequestRouter):  # type: ignore[misc]  # Ray isn't typed
    """Routes calls with the keyword argument :data:`REPLICAS`, and others to any replica."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None or REPLICAS not in pending_request.kwargs:
            return [candidate_replicas]
        wanted = pending_request.kwargs[REPLICAS]
        there = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        ranks = [[there[name]] for name in wanted if name in there]
        if ranks:
            return ranks
        # Without candidates, Ray would ask again and again. It stops when the request's future is done.
        if not pending_request.future.done():
            gone = members.ReplicaGone(f"there is no replica {' or '.join(wanted)} any more")
            pending_request.future.set_exception(gone)
            self._remove_pending_request_from_indices(pending_request)
            pending_request.routing_context.should_backoff = True
        return [candidate_replicas]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._tell()

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super().on_replica_actor_died(replica_id)
        self._tell()

    def _tell(self) -> None:
        members.tell(self._deployment_id, [replica_id.unique_id for replica_id in self.curr_replicas])
