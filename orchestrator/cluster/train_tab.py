"""The run in the Train tab of Ray's dashboard, with its trained ranks (`logging.ray_train_tab`).

Ray lets only its own trainers appear there; what they write is a private record (`ray.train.v2._internal.state`, as it
is in Ray 2.60), kept by a detached actor that the first of them makes on a cluster and that stays. So this is off
unless it is asked for, and where Ray's private classes have changed the run goes on without it, with one warning.

    launched ─► INITIALIZING: the record, RUNNING: its ranks ─► training ─► FINISHED, ERRORED or ABORTED
                      (in the background)                                     (waits TIMEOUT_S at most)
"""

# pyright: basic
# (private classes of Ray)

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from actors.errors import first_lines
from actors.worker import NAMESPACE
from orchestrator.cluster.shutdown import Stopped

TIMEOUT_S = 10.0  # of each exchange with Ray's actor, the imports included
Row = Mapping[str, Any]  # of a process: role, name, node, pid, cpus, gpus


class Tab(Protocol):
    """Where a run is shown. Its calls block, and may raise anything."""

    def close(self, ended: str) -> None:
        """`ended`: the name of one of Ray's states of a run."""
        ...


@asynccontextmanager
async def shown(begin: Callable[[], Tab], warn: Callable[[str], None]) -> AsyncIterator[None]:
    """The run is in the tab as long as this is entered, and then with how it ended. Never raises by itself."""
    began = asyncio.create_task(_unless_it_fails(begin, warn))
    ended = "ERRORED"
    try:
        yield
        ended = "FINISHED"
    except (asyncio.CancelledError, Stopped):  # by a signal, or because somebody asked for it
        ended = "ABORTED"
        raise
    finally:
        tab = await began
        if tab is not None:
            await _unless_it_fails(lambda: tab.close(ended), warn)


async def _unless_it_fails(call: Callable[[], Any], warn: Callable[[str], None]) -> Any:
    """The result of a blocking call; None after a warning."""
    try:
        return await asyncio.wait_for(asyncio.to_thread(call), TIMEOUT_S)
    except Exception as error:
        warn(f"logging.ray_train_tab: the run is not shown there: {type(error).__name__}: {first_lines(error)}")
        return None


@dataclass(frozen=True)
class Rank:
    """A process of a trained role. `actor` and `node` are Ray's ids."""

    actor: str
    node: str
    node_ip: str
    pid: int
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Facts:
    """What the tab shows of a run. `ranks`: one at least; while the first lives, so does the run."""

    run: str
    job: str
    ranks: Sequence[Rank]
    settings: Mapping[str, Any]
    folder: str


class TrainTab:
    """Ray Train's record of one run, with one attempt. The calls block."""

    def __init__(self, run: str, rows: Sequence[Row], settings: Mapping[str, Any], folder: str) -> None:
        import ray
        from ray.train.v2._internal.state import schema, state_actor

        self._schema, self._keeper = schema, state_actor.get_or_create_state_actor()
        nodes = {node["NodeManagerHostname"]: node for node in ray.nodes() if node["Alive"]}
        ranks = [
            Rank(
                ray.get_actor(f"troupe/{run}/{row['name']}", namespace=NAMESPACE)._actor_id.hex(),
                nodes[row["node"]]["NodeID"],
                nodes[row["node"]]["NodeManagerAddress"],
                row["pid"],
                row["cpus"],
                row["gpus"],
            )
            for row in rows
        ]
        job = ray.get_runtime_context().get_job_id()
        self._run, self._attempt = records(schema, Facts(run, job, ranks, settings, folder))
        self._send()

    def close(self, ended: str) -> None:
        now = time.time_ns()
        self._run.status, self._run.end_time_ns = self._schema.RunStatus[ended], now
        self._attempt.status, self._attempt.end_time_ns = self._schema.RunAttemptStatus[ended], now
        for worker in self._attempt.workers:
            worker.status = self._schema.ActorStatus.DEAD
        self._send()

    def _send(self) -> None:
        import ray

        sent = [
            self._keeper.create_or_update_train_run.remote(self._run),
            self._keeper.create_or_update_train_run_attempt.remote(self._attempt),
        ]
        ray.get(sent, timeout=TIMEOUT_S)


def records(schema: Any, facts: Facts) -> tuple[Any, Any]:
    """The run and its attempt, in Ray's classes. `schema`: the module that declares them."""
    import ray

    now = time.time_ns()
    run = schema.TrainRun(
        id=facts.run,
        name=facts.run,
        job_id=facts.job,
        controller_actor_id=facts.ranks[0].actor,
        status=schema.RunStatus.RUNNING,
        start_time_ns=now,
        framework_versions={"ray": ray.__version__},
        run_settings=_settings(schema, facts),
    )
    resources = [schema.TrainResources(resources={"CPU": rank.cpus, "GPU": rank.gpus}) for rank in facts.ranks]
    nodes = list(dict.fromkeys(rank.node for rank in facts.ranks))
    attempt = schema.TrainRunAttempt(
        run_id=facts.run,
        attempt_id=f"{facts.run}-{now}",  # a resumed run has another one
        status=schema.RunAttemptStatus.RUNNING,
        start_time_ns=now,
        resources=resources,
        workers=[
            schema.TrainWorker(
                world_rank=index,
                local_rank=sum(other.node == rank.node for other in facts.ranks[:index]),
                node_rank=nodes.index(rank.node),
                actor_id=rank.actor,
                node_id=rank.node,
                node_ip=rank.node_ip,
                pid=rank.pid,
                gpu_ids=[],
                status=schema.ActorStatus.ALIVE,
                resources=resources[index],
            )
            for index, rank in enumerate(facts.ranks)
        ],
    )
    return run, attempt


def _settings(schema: Any, facts: Facts) -> Any:
    """Troupe's configuration stands in the place of a training loop's."""
    execution = schema.ExecutionOptions(
        resource_limits={},
        exclude_resources={},
        preserve_order=False,
        actor_locality_enabled=False,
        verbose_progress=False,
    )
    return schema.RunSettings(
        train_loop_config=dict(facts.settings),
        backend_config=schema.BackendConfig(config={}),
        scaling_config=schema.ScalingConfig(
            num_workers=len(facts.ranks),
            use_gpu=any(rank.gpus for rank in facts.ranks),
            use_tpu=False,
            placement_strategy="PACK",
        ),
        datasets=[],
        data_config=schema.DataConfig(
            datasets_to_split="all",
            data_execution_options=schema.DataExecutionOptions(default=execution),
            enable_shard_locality=False,
        ),
        run_config=schema.RunConfig(
            name=facts.run,
            failure_config=schema.FailureConfig(max_failures=0, controller_failure_limit=0),
            worker_runtime_env={},
            checkpoint_config=schema.CheckpointConfig(checkpoint_score_order="max"),
            storage_path=facts.folder,
        ),
    )
