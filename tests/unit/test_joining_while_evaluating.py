"""An engine that comes up while the trained ranks evaluate: it gets its weights from them, so it waits."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from actors.worker import LocalGroup, LocalWorker, Ref
from orchestrator.cluster.fleet import State
from orchestrator.losses.likelihood import nll
from orchestrator.losses.reduce import token_mean
from orchestrator.pipeline import Completions, Pipeline, infer, update
from rollout.weights import PackBuckets
from tests.local_executor import local_executor
from tests.unit.collector_stage import settled
from tests.unit.test_executor import Ranks, table
from tests.unit.test_publisher import PackingTrainer, published
from tests.waiting import until_true

SOON_S = 60.0


class Evaluating(PackingTrainer):
    """Evaluates until the test says that it ends."""

    def __init__(self) -> None:
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()
        self.packed = 0  # times that somebody asked for its weights to catch up

    async def evaluate(self, *_: Any) -> dict[str, float]:
        self.begun.set()
        await asyncio.wait_for(self.may_end.wait(), SOON_S)
        return {"loss": 1.0}

    def export(self, consumer: Any, bucket_bytes: int, form: str) -> Any:
        self.packed += isinstance(consumer, PackBuckets)
        return super().export(consumer, bucket_bytes, form)


async def test_a_joiners_deadline_does_not_run_while_the_trained_ranks_evaluate(tmp_path: Path) -> None:
    async def nothing(_: Any) -> None: ...

    trainer = Evaluating()
    policy = LocalGroup("policy", LocalWorker("policy/0", trainer))
    publisher, pool = await published(tmp_path, nothing, policy)
    pipeline = Pipeline(Completions, update("policy", nll, reduce=token_mean))
    roles = local_executor(pipeline, {"policy": policy}, token_budget=1000, publishers=(publisher,))
    evaluating = asyncio.ensure_future(roles.evaluate(table()))
    await asyncio.wait_for(trainer.begun.wait(), SOON_S)
    await pool.evict(0, "killed")
    await until_true(lambda: 2 in pool.infos, "the process of the replacement", timeout_s=SOON_S)
    await settled()
    assert trainer.packed == 0 and not evaluating.done(), "behind the evaluation, its deadline would run"
    trainer.may_end.set()
    assert await asyncio.wait_for(evaluating, SOON_S) == {"loss": 1.0}
    await until_true(lambda: pool.indices(State.SERVING) == [1, 2], "the replacement", timeout_s=SOON_S)
    assert trainer.packed == 1 and publisher.holds(2) and pool.fleet.restarts == 1
    await pool.close()


class Watched(Ranks):
    """Whether the weights were held still in each call."""

    def __init__(self, name: str, lock: asyncio.Lock) -> None:
        super().__init__(name, [])
        self._lock, self.held = lock, list[bool]()

    async def call(self, method: str, *shared: Any, **options: Any) -> list[Any]:
        self.held.append(self._lock.locked())
        return await super().call(method, *shared, **options)

    async def call_split(self, method: str, *shared: Any, **options: Any) -> list[tuple[Any, Ref]]:
        self.held.append(self._lock.locked())
        return await super().call_split(method, *shared, **options)


async def test_an_evaluation_holds_joiners_up_only_for_what_the_trained_ranks_do() -> None:
    """As a step does: a frozen role may be a pool of engines, whose own joiners it would wait for."""
    publisher = SimpleNamespace(changing=asyncio.Lock(), role="rollout", source="policy")
    reference, policy = Watched("reference", publisher.changing), Watched("policy", publisher.changing)
    stages = infer("reference", into="ref_logps"), infer("policy", into="old_logps")
    pipeline = Pipeline(Completions, *stages, update("policy", nll, reduce=token_mean))
    groups: dict[str, Any] = {"reference": reference, "policy": policy}
    roles = local_executor(pipeline, groups, token_budget=1000, publishers=(publisher,))
    assert await asyncio.wait_for(roles.evaluate(table()), SOON_S) == {"loss": 1.0}
    assert (reference.held, policy.held) == ([False], [True, True])
