"""The policy of affinity.py as a request router of Ray Serve, which keeps queues, retries and probes."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    MultiplexMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

from loramux.replicas.affinity import ranked
from loramux.replicas.forwarding import BASE_KEY, members_of_key

SEAT = "seat"  # in Ray's replica metadata: a number that a replacement inherits


class AffinityRouter(FIFOMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]
    """Ranks the replicas for each request by its multiplexed model id, the adapters' names.

    Ray's routing tasks come and go beside the requests. One that has found a replica gives it to a
    waiting request of the same id (MultiplexMixin), and otherwise to the first that waits (FIFOMixin);
    without the latter, requests whose task has gone would wait for ever.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """One replica a rank. Ray takes the first that has room, and asks again if none has."""
        if not candidate_replicas:
            return []
        serves = pending_request or self._first_waiting()
        key = BASE_KEY if serves is None else serves.metadata.multiplexed_model_id
        if pending_request is not None:
            # All replicas are in the answer: before asking again, Ray shall wait.
            pending_request.routing_context.should_backoff = True
        replicas = sorted(candidate_replicas, key=lambda r: str(r.replica_id.unique_id))
        queues = self.replica_queue_len_cache
        loads = [queues.get(replica.replica_id) or 0 for replica in replicas]
        order = ranked(members_of_key(key), _seats(replicas), loads)
        return [[replicas[index]] for index in order]

    def _first_waiting(self) -> PendingRequest | None:
        """The request that FIFOMixin will give a replica to that was found for none in particular."""
        waiting = (pr for pr in self._pending_requests_to_fulfill if not pr.future.done())
        return next(waiting, None)


def _seats(replicas: list[Any]) -> tuple[str, ...]:
    """A name for each replica, its seat where it has one for itself."""
    names: list[str] = []
    for replica in replicas:
        seat = str(replica.replica_metadata.get(SEAT, ""))
        names.append(seat if seat and seat not in names else str(replica.replica_id.unique_id))
    return tuple(names)
