"""Ray's part of the routing: a front attaches to each replica, by name.

The front chooses the replica of a request (:mod:`.routing`), since it knows the load without asking: Ray's own
prefix-aware router is compared with it in docs/scaling.md. Ray pickles this module by value, with all that it defines,
so state is in :mod:`.members`.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from trunkline.core.cluster import members

REPLICA = "replica"  # the keyword argument of a call: the name of the replica that gets it


class NamedReplica(RequestRouter):  # type: ignore[misc]  # Ray isn't typed
    """Routes calls with the keyword argument :data:`REPLICA`, and others to any replica."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None or REPLICA not in pending_request.kwargs:
            return [candidate_replicas]
        name = pending_request.kwargs[REPLICA]
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == name]
        if named:
            return [named]
        # Without candidates, Ray would ask again and again. It stops when the request's future is done.
        if not pending_request.future.done():
            gone = members.ReplicaGone(f"there is no replica {name} any more")
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
