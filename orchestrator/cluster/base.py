"""Where the roles of a plan run: over Ray (`orchestrator.cluster.ray_cluster.RayCluster`), or all in this process.

reserve(plan) ─► start_group(role), start_worker(role, i) ─► ... ─► stop_worker(w) ─► close()
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import actors
from actors.errors import ConfigError, RunError
from actors.worker import Group, LocalGroup, LocalObjects, LocalWorker, Objects, Worker, WorkerInfo
from orchestrator.planning.plan import Plan

START_TIMEOUT_S = 600.0  # of a role's processes: loading a large model from a slow disk


class Cluster(Protocol):
    """What a run asks of the machines."""

    objects: Objects

    @property
    def has_processes(self) -> bool:
        """Whether a worker is a process of its own, whose start leaves alone what others compute."""
        ...

    @property
    def address(self) -> str | None:
        """Where another process finds this cluster; None if nowhere."""
        ...

    @property
    def host(self) -> str:
        """This process' own address as the other processes of the cluster reach it."""
        ...

    async def reserve(self, plan: Plan) -> None:
        """Room for everything in the plan, or PlacementError that says which role lacks what."""
        ...

    async def start_group(self, role: str, target: type, kwargs_per_rank: Sequence[Mapping[str, Any]]) -> Group:
        """The ranks of a gang role in their bundles, ready."""
        ...

    async def start_worker(self, role: str, index: int, target: type, kwargs: Mapping[str, Any]) -> Worker:
        """One worker of an elastic role, placed. Its `ready` is still to be called. Raises InfraFailure if there is no
        room for it now."""
        ...

    async def stop_worker(self, worker: Worker) -> None:
        """End a worker of an elastic role and give its room back. Stopping twice is fine."""
        ...

    async def room(self, role: str) -> int | None:
        """For how many more workers of an elastic role there is room now; None: no limit is known."""
        ...

    def describe(self) -> list[dict[str, Any]]:
        """One row per process that is ready: role, name, node, pid, cpus, gpus, threads."""
        ...

    def lost(self, within_s: float = 0.0) -> str | None:
        """What of the machinery under this cluster is gone, and every process with it: as soon as something is; None if
        nothing is within that time. Blocks its thread, which may be any."""
        ...

    async def close(self) -> None:
        """End every process and give all room back. Closing twice is fine."""
        ...


class LocalCluster:
    """Everything in this process: no Ray, no processes, nothing to reserve. For `--local`, tests and debugging."""

    address, host = None, "127.0.0.1"
    has_processes = False

    def __init__(self) -> None:
        self.objects: Objects = LocalObjects()
        self._plan: Plan | None = None
        self._workers: dict[str, LocalWorker] = {}

    async def reserve(self, plan: Plan) -> None:
        large = [role for role in plan.roles.values() if not role.elastic and role.count > 1]
        if large:
            given = ", ".join(f"roles.{role.name}.ranks={role.count}" for role in large)
            raise ConfigError(f"{given}: with --local a role is one rank in this process; set it to 1, or run without")
        self._plan = plan

    async def start_group(self, role: str, target: type, kwargs_per_rank: Sequence[Mapping[str, Any]]) -> Group:
        group = LocalGroup(role, self._start(f"{role}/0", target, kwargs_per_rank[0]))
        await group.call("ready", timeout_s=START_TIMEOUT_S)
        return group

    async def start_worker(self, role: str, index: int, target: type, kwargs: Mapping[str, Any]) -> Worker:
        return self._start(f"{role}/{index}", target, kwargs)

    async def stop_worker(self, worker: Worker) -> None:
        self._workers.pop(worker.name, None)
        await worker.kill()

    async def room(self, role: str) -> int | None:
        return None

    def describe(self) -> list[dict[str, Any]]:
        plan = self._plan
        named = [(name.split("/")[0], name) for name in self._workers]
        planned = [(plan.roles[role], name) for role, name in named if plan is not None and role in plan.roles]
        here = {"node": platform.node(), "pid": os.getpid()}
        return [{"role": role.name, "name": name, **here, "threads": role.threads} for role, name in planned]

    def lost(self, within_s: float = 0.0) -> str | None:
        time.sleep(within_s)
        return None

    async def close(self) -> None:
        workers, self._workers = list(self._workers.values()), {}
        await asyncio.gather(*(worker.kill() for worker in workers))

    def _start(self, name: str, target: Callable[..., Any], kwargs: Mapping[str, Any]) -> LocalWorker:
        self._workers[name] = LocalWorker(name, target(**kwargs))
        return self._workers[name]


def refuse_foreign(info: WorkerInfo) -> None:
    """Raises RunError if a worker imported our packages from somewhere else than this process did: the two would be
    different programs."""
    ours = str(Path(actors.__file__).parent)
    if info.packages != ours:
        raise RunError(
            f"{info.name} on {info.node} (pid {info.pid}) imported `actors` from {info.packages}, the driver from "
            f"{ours}; install Troupe in the same place on every node"
        )
