"""A node of a cluster dies with samples that nobody has learned from yet. Real Ray, several raylets on this machine."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from actors.batch import Batch
from actors.group import RayObjects, RayWorker, start_ranks, start_worker
from orchestrator.batches.batch_stages import PhaseSettings
from orchestrator.batches.row_table import RowTable
from orchestrator.cluster.failures import Ledger, Watchdog
from orchestrator.cluster.pool import Pool, PoolPolicy
from orchestrator.cluster.ray_connection import end_half_started, started
from orchestrator.collection.cursor import Cursor
from orchestrator.collection.group_collector import GroupCollector
from orchestrator.collection.staleness import Contract
from orchestrator.data.items import Prompt
from orchestrator.executor import Executor
from orchestrator.losses.likelihood import nll
from orchestrator.pipeline import Pipeline, Prompts, generate, update
from rollout.sampling import Sampling, sample_seed
from tests.lost_samples import MANY_TOKENS, Holder, Sampler, sampled

READY_S = 300.0


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that stays, and two nodes with room for one sampler each."""
    head = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    found = started(lambda: Cluster(initialize_head=True, head_node_args=head), end_half_started, warnings.warn)
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.shutdown()


class NodeThatDies(Executor):
    """Once a batch is collected, and before it is learned, the node that holds it dies."""

    async def run_batch_stages(self, table: RowTable) -> RowTable:
        if self.die is not None:
            die, self.die = self.die, None
            await die()
        return table

    die: Callable[[], Awaitable[None]] | None = None


async def test_samples_that_are_lost_with_their_node_are_sampled_again_elsewhere_to_the_bit(
    cluster: Cluster,
) -> None:
    room = {"num_cpus": 0, "resources": {"sampler": 1}, "object_store_memory": 80 * 2**20}
    by_id = {node.node_id: node for node in (cluster.add_node(wait=False, **room) for _ in range(2))}
    cluster.wait_for_nodes()
    events: list[str] = []

    async def start(index: int) -> RayWorker:
        options = {"num_cpus": 0, "resources": {"sampler": 1}}
        return start_worker(f"lost/rollout/{index}", Sampler, {}, ray_options=options)

    async def stop(worker: RayWorker) -> None:
        await worker.kill()

    async def die() -> None:
        [info] = engines.infos.values()
        await asyncio.to_thread(cluster.remove_node, by_id.pop(info.node))

    pool = PoolPolicy(slots=4, max_attempts=3, call_timeout_s=120, start_timeout_s=READY_S, max_restarts=3)
    engines = Pool(
        "rollout", 1, pool, start=start, stop=stop, event=lambda kind, _: events.append(kind), watchdog=Watchdog()
    )
    policy = start_ranks("lost/policy", Holder, [{}], ray_options_per_rank=[{"num_cpus": 1}])
    roles = NodeThatDies(
        {"policy": policy},
        RayObjects(),
        start=lambda role, model: asyncio.sleep(0),
        engines={"rollout": engines},
        scorers={},
        model_rewards=(),
        publishers=(),
        call_timeout_s={"policy": READY_S},
        stand_ins={},
        concurrent=False,
    )
    pipeline = Pipeline(Prompts, generate("rollout", n=2), update("policy", nll))
    roles.enter(PhaseSettings(pipeline, 10**6, 1.0, 0, Sampling(max_tokens=MANY_TOKENS)))
    roles.die = die
    prompts = SimpleNamespace(
        order=SimpleNamespace(at=lambda position: (0, position)),
        item=lambda index: Prompt(index, (1,), "", {}),
    )
    settings = {"run": "lost", "seed": 3, "version": 0, "ledger": Ledger(100), "watchdog": Watchdog()}
    feed = GroupCollector(prompts, roles, pipeline, Cursor(), Contract(0, 3, batches=1), **settings)
    try:
        await engines.open()
        collected = await feed.next(0)
        assert collected.positions == (0, 1, 2)
        assert (collected.metrics["groups/lost"], events.count("evicted")) == (3, 1)
        assert {group.metas[0].worker for group in collected.groups} == by_id.keys(), "sampled on the node that is left"
        expected = Batch.concat(sampled(sample_seed(3, position), 2) for position in range(3))
        np.testing.assert_array_equal(await roles.column("tokens", collected.table), expected["tokens"])
    finally:
        await feed.close()
        await engines.close()
        await policy.kill()
