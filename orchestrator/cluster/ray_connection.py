"""Connecting to Ray: to one that runs, or to one that this process starts, whose daemons are then its children."""

from __future__ import annotations

import gc
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import psutil
import ray
from ray._private.state import available_resources_per_node  # of each node; the public function has the sum only
from ray.job_config import JobConfig

from actors.errors import PlacementError, RunError, first_lines
from actors.worker import NAMESPACE
from orchestrator.cluster.private_temp import private_temp
from orchestrator.cluster.ray_address import LOCAL, chosen_address, refuse_unreachable, set_by
from orchestrator.config.schema import ClusterConfig
from orchestrator.import_pin import worker_setup
from orchestrator.planning.bundles import ClusterView, Node
from orchestrator.planning.machine import Machine
from orchestrator.planning.plan import HEADROOM_CPUS, Plan
from orchestrator.plugins import carried

T = TypeVar("T")

START_ATTEMPTS = 3  # of a Ray of our own
DAEMONS = ("gcs_server", "raylet")


def connect(cluster: ClusterConfig, plan: Plan, *, debug: bool = False, json_logs: bool = False) -> str | None:
    """Connect to the Ray at `cluster.address`, else at RAY_ADDRESS, else start one of our own. Returns the URL of
    its dashboard, if it has one. `json_logs`: what workers log is JSON lines in Ray's files.

    An address that has to be guessed (`auto`) is refused: it may be somebody else's Ray."""
    address = chosen_address(cluster)
    own: dict[str, Any] = {}
    if address == LOCAL:
        own = {
            "num_cpus": _own_cpus(cluster, plan),
            "object_store_memory": cluster.object_store_mib * 2**20,
            "include_dashboard": cluster.dashboard,
            "_temp_dir": str(private_temp()),
        }
        # Our actors have environments of their own, so none would be taken from Ray's stock of idle workers.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    else:
        refuse_unreachable(address, set_by(cluster))

    def start() -> Any:
        return ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=debug,
            logging_level=logging.INFO if debug else logging.CRITICAL,
            job_config=_job_config(json_logs),
            runtime_env={"worker_process_setup_hook": worker_setup(carried(), log_warnings=json_logs)},
            **own,
        )

    try:
        context = started(start, end_half_started, _warn) if address == LOCAL else start()
    except (ConnectionError, RuntimeError) as error:
        raise PlacementError(f"cannot connect to the Ray at {address}: {first_lines(error)}") from None
    return f"http://{context.dashboard_url}" if context.dashboard_url else None


def _job_config(json_logs: bool) -> JobConfig:
    """Of workers alone. `ray.init(logging_config=...)` and RAY_LOGGING_CONFIG_ENCODING in the environment would apply
    it to the driver, too, and what that prints is for people. Libraries are heard as without it: from warnings on."""
    job = JobConfig()
    if json_logs:
        job.set_py_logging_config(ray.LoggingConfig(encoding="JSON", log_level="WARNING"))
    return job


def started(start: Callable[[], T], clean_up: Callable[[], None], warn: Callable[[str], None]) -> T:
    """The result of `start`, tried again if Ray does not start within its own time limit, as happens on a busy machine.
    Raises RunError when all attempts are used up; other errors of `start` are raised as they are."""
    for attempt in range(2, START_ATTEMPTS + 2):
        try:
            return start()
        except Exception as error:  # Ray has no class for it
            if "timed out during startup" not in str(error):
                raise
        clean_up()
        if attempt <= START_ATTEMPTS:
            load = f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
            warn(f"Ray did not start within its 30 s ({load}); attempt {attempt} of {START_ATTEMPTS}")
    raise RunError(
        f"Ray did not start within its 30 s, {START_ATTEMPTS} times: let the machine come to rest, or give "
        "cluster.address of a Ray that runs; its logs are in /tmp/ray/session_latest/logs"
    )


def disconnect() -> None:
    """To be called in the thread that runs the event loop. Whoever lets go of an object of Ray's while Ray shuts down,
    another thread or the garbage collector, ends the process at once with exit code 1 ("The core worker has already
    been shutdown")."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        if collecting:
            gc.enable()


def end_half_started() -> None:
    disconnect()
    for _, daemon in own_daemons():
        daemon.kill()


def _warn(message: str) -> None:
    print(f"troupe: {message}", file=sys.stderr, flush=True)


def cluster_at_hand(cluster: ClusterConfig, plan: Plan) -> ClusterView:
    """What `connect` would find: the nodes of a running Ray, or this machine as our own Ray would offer it. Starts
    nothing, and leaves no connection behind."""
    if chosen_address(cluster) == LOCAL:
        import torch

        return ClusterView.of_machine(cpus=_own_cpus(cluster, plan), gpus=torch.cuda.device_count())
    connect(cluster, plan)
    try:
        return view_cluster()
    finally:
        disconnect()


def _own_cpus(cluster: ClusterConfig, plan: Plan) -> int:
    """CPUs of a Ray of our own: the plan's, and room for workers that join later. They are book-keeping: what is really
    shared are the cores, by the plan's threads."""
    return cluster.num_cpus or max(Machine.here().cores, math.ceil(plan.total("CPU"))) + HEADROOM_CPUS


def view_cluster() -> ClusterView:
    """The living nodes of the Ray that this process is connected to."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return ClusterView(
        tuple(
            Node(node["NodeManagerHostname"] + "/" + node["NodeID"][:6], node["Resources"], node["Labels"])
            for node in nodes
        )
    )


def view_free() -> ClusterView:
    """The same, with what is free on each node now."""
    free = available_resources_per_node()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return ClusterView(
        tuple(Node(node["NodeID"], free.get(node["NodeID"], {}), node["Labels"]) for node in nodes),
    )


def own_daemons() -> tuple[tuple[str, psutil.Process], ...]:
    """Of a Ray that this process started: those of its children without which there is no Ray. Empty if it connected to
    a Ray that was there."""
    named = [(os.path.basename(_command_of(child)), child) for child in psutil.Process().children()]
    return tuple((name, child) for name, child in named if name in DAEMONS)


def _command_of(process: psutil.Process) -> str:
    """Empty for a process that has ended, reaped or not: a daemon that did not come up, say."""
    try:
        return (process.cmdline() or [""])[0]
    except psutil.NoSuchProcess:  # a zombie is one
        return ""


def session(daemons: Iterable[tuple[str, psutil.Process]]) -> str:
    """The name of their Ray's session folder, which the command lines of all its daemons and agents hold."""
    found = re.search(r"session_\d[\d_-]+\d", " ".join(part for _, daemon in daemons for part in daemon.cmdline()))
    if found is None:
        raise RunError("the command lines of Ray's daemons name no session: this version of Ray is not known")
    return found[0]


def is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
