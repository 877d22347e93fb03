"""Room on the cluster's nodes: asked for, held, given back, and about to be taken away."""

from __future__ import annotations

from typing import Any

import ray
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from jobs.cluster.resources import Resources


class Wish:
    """Room for workers, asked for by a placement group: it waits for its turn, and an autoscaler adds nodes for it.

    `ray.autoscaler.sdk.request_resources` would be one request for the whole cluster: that of the last job to call it.
    """

    def __init__(self, resources: Resources) -> None:
        self._group: Any = placement_group([resources.per_worker()] * resources.workers)

    def granted(self, timeout_s: float = 0) -> bool:
        """Whether there is room now: it is held until the wish is withdrawn."""
        return bool(self._group.wait(timeout_s))

    def withdraw(self) -> None:
        """Ask no more, and give back."""
        remove_placement_group(self._group)


def release_placement_groups() -> None:
    """Give back what a Ray Train controller of this job has left behind that died with its workers' room in its hands.

    Ray keeps such a group until the whole job ends, and Ray Train's own cleaner asks Ray's dashboard, which a local Ray
    has not. There is no public call that tells whose a group is.
    """
    accessor, job = ray._private.state.state._connect_and_get_accessor(), ray.get_runtime_context().get_job_id()
    for content in accessor.get_placement_group_table():
        found = PlacementGroupTableData.FromString(content)
        removed = found.state == PlacementGroupTableData.PlacementGroupState.REMOVED
        maker = found.creator_actor_id
        orphaned = maker and not ray.ActorID(maker).is_nil() and found.creator_actor_dead
        if found.creator_job_id.hex() == job and orphaned and not removed:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(found.placement_group_id)))


def draining_nodes() -> set[str]:
    """Ids of the nodes that are about to be taken away: preempted, drained by hand, or stopped with SIGTERM."""
    # There is no public call that asks; Ray Train's own watcher asks here too, but then decides by itself.
    return set(ray._private.state.state.get_draining_nodes())
