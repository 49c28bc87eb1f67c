"""The roles of a plan on Ray: bundles to placement groups, processes to actors.

    reserve ──► one placement group for the gang: ranks of policy, reference, ... and roles that share their bundles
            └─► one small group for each elastic worker of its own; joining makes another, leaving removes it

Ray lets an infeasible group wait without a message. So every wait for one has a deadline
(`cluster.placement_timeout_s`), after which the error says which role lacks what. Processes are killed before their
group is removed: a call to an actor whose group is gone may never return.
"""

from __future__ import annotations

import asyncio
import os
import select
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.errors import InfraFailure, PlacementError
from actors.group import RayGroup, RayObjects, RayWorker, start_ranks, start_worker
from actors.worker import Group, Objects, Worker, WorkerInfo
from orchestrator.cluster.base import START_TIMEOUT_S, refuse_foreign
from orchestrator.cluster.leftovers import Leftovers
from orchestrator.cluster.ray_connection import disconnect, is_running, own_daemons, session, view_cluster, view_free
from orchestrator.config.schema import RunConfig
from orchestrator.planning.bundles import NO_ROOM, Bundle, describe, how_many_fit, shortages
from orchestrator.planning.plan import Plan, RolePlan

POLL_S = 0.05
MOST_AT_ONCE = 64  # workers that room is looked for


@dataclass(frozen=True)
class Slot:
    """A bundle of a placement group. `own`: the group is this slot's alone and goes with it."""

    group: PlacementGroup
    index: int
    own: bool

    def options(self, resources: Mapping[str, float]) -> dict[str, Any]:
        """An actor's options for running here with these resources."""
        custom = {name: value for name, value in resources.items() if name not in ("CPU", "GPU", "memory")}
        return {
            "num_cpus": resources.get("CPU", 0.0),
            "num_gpus": resources.get("GPU", 0.0),
            **({"memory": resources["memory"]} if "memory" in resources else {}),
            **({"resources": custom} if custom else {}),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, self.index),
        }


class PlacedWorker(RayWorker):
    """An actor with the slot that it holds. It is refused if it turns out to run other packages than the driver."""

    def __init__(self, worker: RayWorker, role: RolePlan, slot: Slot) -> None:
        super().__init__(worker.name, worker.handle)
        self.role, self.slot = role, slot

    async def call(self, method: str, *args: Any, timeout_s: float, task_name: str | None = None, **kwargs: Any) -> Any:
        result = await super().call(method, *args, timeout_s=timeout_s, task_name=task_name, **kwargs)
        if isinstance(result, WorkerInfo):
            refuse_foreign(result)
        return result

    def row(self) -> dict[str, Any] | None:
        """For the table of what is placed where; None before it is ready."""
        if self.info is None:
            return None
        cpus, gpus = (self.role.resources.get(kind, 0.0) for kind in ("CPU", "GPU"))
        name = "/".join(self.name.split("/")[-2:])
        return {
            "role": self.role.name,
            "name": name,
            "node": self.info.node,
            "pid": self.info.pid,
            "cpus": cpus,
            "gpus": gpus,
            "threads": self.role.threads,
        }


class RayCluster:
    """See `orchestrator.cluster.base.Cluster`. Ray must be connected; `disconnect`: whether `close` ends that, too."""

    has_processes = True

    def __init__(self, config: RunConfig, run: str, *, disconnect: bool = True) -> None:
        self.objects: Objects = RayObjects()
        self.address: str | None = ray.get_runtime_context().gcs_address
        self.host: str = ray.util.get_node_ip_address()
        self._run, self._timeout_s, self._disconnect = run, config.cluster.placement_timeout_s, disconnect
        self._plan: Plan | None = None
        self._gang: PlacementGroup | None = None
        self._slots: dict[str, tuple[Slot, ...]] = {}  # of ranks, in the order of their nodes
        self._free: dict[str, deque[Slot]] = {}  # of elastic workers
        self._groups: list[RayGroup] = []
        self._workers: dict[str, PlacedWorker] = {}
        self._daemons = own_daemons()
        self._daemon_descriptors = [os.pidfd_open(process.pid) for _, process in self._daemons]  # readable once ended
        # Not in `close`: another thread may wait on them.
        weakref.finalize(self, _close_descriptors, self._daemon_descriptors)
        self._leftovers = Leftovers(session(self._daemons)) if self._daemons and disconnect else None

    async def reserve(self, plan: Plan) -> None:
        self._plan = plan
        wanted = [plan.gang] if plan.gang else []
        alone = [role for role in plan.elastic if role.host is None for _ in range(role.count)]
        wanted += [(role.own_bundle,) for role in alone]
        groups = await self._create(wanted)
        if plan.gang:
            self._gang = groups.pop(0)
            await asyncio.to_thread(self._assign_slots, plan, self._gang)
        for role, group in zip(alone, groups, strict=True):
            self._free.setdefault(role.name, deque()).append(Slot(group, 0, own=True))

    async def start_group(self, role: str, target: type, kwargs_per_rank: Sequence[Mapping[str, Any]]) -> Group:
        planned, slots = self._planned(role), self._slots[role]
        options = [slot.options(planned.resources) for slot in slots[: len(kwargs_per_rank)]]
        group = start_ranks(
            f"troupe/{self._run}/{role}", target, kwargs_per_rank, ray_options_per_rank=options, env=planned.env
        )
        group.workers = tuple(
            PlacedWorker(worker, planned, slot) for worker, slot in zip(group.workers, slots, strict=False)
        )
        self._groups.append(group)
        await group.call("ready", timeout_s=START_TIMEOUT_S)
        return group

    async def start_worker(self, role: str, index: int, target: type, kwargs: Mapping[str, Any]) -> Worker:
        planned = self._planned(role)
        slot = await self._slot_for(planned)
        name = f"troupe/{self._run}/{role}/{index}"
        started = start_worker(name, target, kwargs, ray_options=slot.options(planned.resources), env=planned.env)
        self._workers[name] = PlacedWorker(started, planned, slot)
        return self._workers[name]

    async def stop_worker(self, worker: Worker) -> None:
        await worker.kill()
        placed = self._workers.pop(worker.name, None)
        if placed is None:
            return
        if placed.slot.own:
            await asyncio.to_thread(remove_placement_group, placed.slot.group)
        else:
            self._free[placed.role.name].append(placed.slot)

    async def room(self, role: str) -> int | None:
        planned, kept = self._planned(role), len(self._free.get(role, ()))
        if planned.host is not None:
            return kept
        try:
            free = await asyncio.to_thread(view_free)
        except RayError:  # while Ray does not answer, it places nobody either
            return kept
        return kept + how_many_fit(planned.own_bundle, free, at_most=MOST_AT_ONCE)

    def describe(self) -> list[dict[str, Any]]:
        ranks = [worker for group in self._groups for worker in group.workers if isinstance(worker, PlacedWorker)]
        rows = [worker.row() for worker in (*ranks, *self._workers.values())]
        return [row for row in rows if row is not None]

    def lost(self, within_s: float = 0.0) -> str | None:
        ended = select.poll()
        for descriptor in self._daemon_descriptors:
            ended.register(descriptor, select.POLLIN)
        if within_s:
            ended.poll(1000 * within_s)
        gone = [(name, process.pid) for name, process in self._daemons if not is_running(process)]
        return f"Ray's {gone[0][0]} (pid {gone[0][1]}) is gone, and every process of the run with it" if gone else None

    async def close(self) -> None:
        if not ray.is_initialized() or self.lost() is not None:
            return
        workers, self._workers = list(self._workers.values()), {}
        groups, self._groups = self._groups, []
        await asyncio.gather(*(each.kill() for each in (*groups, *workers)))
        own = [slot.group for slot in (*(w.slot for w in workers), *self._spare()) if slot.own]
        for group in [*own, *([self._gang] if self._gang else [])]:
            await asyncio.to_thread(remove_placement_group, group)
        self._free, self._gang = {}, None
        if self._disconnect:
            self._daemons = ()  # they end now, on purpose: not a failure
            disconnect()
            if self._leftovers is not None:
                self._leftovers.end()

    def _planned(self, role: str) -> RolePlan:
        assert self._plan is not None, "reserve a plan first"
        return self._plan.roles[role]

    def _spare(self) -> list[Slot]:
        return [slot for slots in self._free.values() for slot in slots]

    async def _slot_for(self, role: RolePlan) -> Slot:
        """A slot that was reserved or given back, else a new one."""
        free = self._free.get(role.name)
        if free:
            return free.popleft()
        if role.host is not None:
            raise InfraFailure(
                f"no room for a {role.name} worker: it shares the {len(role.bundles)} bundle(s) of {role.host}"
            )
        try:
            (group,) = await self._create([(role.own_bundle,)])
        except PlacementError as error:
            raise InfraFailure(f"no room for a {role.name} worker: {error}") from None
        return Slot(group, 0, own=True)

    def _assign_slots(self, plan: Plan, gang: PlacementGroup) -> None:
        """Ranks of a role that are neighbours get bundles of the same node; colocated roles share their host's."""
        nodes: dict[int, str] = placement_group_table(gang)["bundles_to_node_id"]
        order = {node: place for place, node in enumerate(dict.fromkeys(nodes[index] for index in sorted(nodes)))}
        for role in plan.roles.values():
            by_node = sorted(role.bundles, key=lambda index: (order[nodes[index]], index))
            slots = tuple(Slot(gang, index, own=False) for index in by_node)
            if role.elastic and role.host is not None:
                self._free[role.name] = deque(slots)
            elif not role.elastic:
                self._slots[role.name] = slots

    async def _create(self, wanted: Sequence[Sequence[Bundle]]) -> list[PlacementGroup]:
        """Placement groups for these bundles, all reserved. Where there is no room in time, the bundles' next choice of
        nodes is tried. Raises PlacementError, and then leaves none behind."""
        groups: list[PlacementGroup] = []
        try:
            for bundles in wanted:
                groups.append(await asyncio.to_thread(_ask, bundles, 0))
            pending = await self._pending(groups, range(len(groups)))
            for choice in range(1, max((_choices(bundles) for bundles in wanted), default=1)):
                for index in pending:
                    if choice < _choices(wanted[index]):
                        await asyncio.to_thread(remove_placement_group, groups[index])
                        groups[index] = await asyncio.to_thread(_ask, wanted[index], choice)
                pending = await self._pending(groups, pending)
            if pending:
                lacking = [bundle for index in pending for bundle in wanted[index]]
                everything = [bundle for bundles in wanted for bundle in bundles]
                raise PlacementError(await asyncio.to_thread(self._explain, lacking, everything))
        except BaseException:
            for group in groups:
                remove_placement_group(group)
            raise
        return groups

    async def _pending(self, groups: Sequence[PlacementGroup], among: Iterable[int]) -> list[int]:
        """Which of these groups were not reserved by the deadline."""
        deadline = time.monotonic() + self._timeout_s
        pending = list(among)
        while pending:
            pending = [index for index in pending if not await asyncio.to_thread(_is_created, groups[index])]
            if not pending or time.monotonic() > deadline:
                break
            await asyncio.sleep(POLL_S)
        return pending

    def _explain(self, lacking: Sequence[Bundle], everything: Sequence[Bundle]) -> str:
        """Which role lacks what: of the whole cluster, or of what others leave free of it."""
        view = view_cluster()
        lines = shortages(everything, view)
        if not lines:
            free = describe({name: ray.available_resources().get(name, 0.0) for name in ("GPU", "CPU")})
            asked = dict.fromkeys(f"{bundle.label}: {bundle.needs} each" for bundle in lacking)
            lines = [*asked, f"the cluster is large enough, but others use it: {free} free now"]
        return "\n".join([f"{NO_ROOM} ({view}) within cluster.placement_timeout_s={self._timeout_s:g}:", *lines])


def _close_descriptors(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _ask(bundles: Sequence[Bundle], choice: int) -> PlacementGroup:
    """A group for these bundles, on the nodes that they prefer, or their next choice."""
    selectors = [dict(bundle.selectors[choice]) if bundle.selectors else {} for bundle in bundles]
    resources = [dict(bundle.resources) for bundle in bundles]
    labelled: dict[str, Any] = {"bundle_label_selector": selectors} if any(selectors) else {}
    return placement_group(resources, "PACK", **labelled)


def _choices(bundles: Sequence[Bundle]) -> int:
    return max(1, *(len(bundle.selectors) for bundle in bundles))


def _is_created(group: PlacementGroup) -> bool:
    return placement_group_table(group)["state"] == "CREATED"
