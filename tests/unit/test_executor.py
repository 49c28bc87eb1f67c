"""Batch stages become calls on groups of ranks: which wait for which, what each is given, and what comes back."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from actors.batch import Batch
from actors.columns import Head
from actors.errors import RunError
from actors.model_worker import UpdateReport
from actors.sharding import Shard
from actors.worker import LocalObjects, Ref
from orchestrator.batches.row_table import RowTable
from orchestrator.credit.advantages import credits
from orchestrator.executor import Executor
from orchestrator.losses.declare import Loss
from orchestrator.losses.likelihood import nll
from orchestrator.losses.reduce import token_mean
from orchestrator.losses.views import Scalars, Tokens
from orchestrator.methods import build
from orchestrator.pipeline import Completions, Pipeline, credit, infer, update
from tests.local_executor import batch_stages, local_executor

SOON_S = 60.0  # of waits that end at once, if they end at all


def against_reference(tokens: Tokens, *, weight: float = 1.0) -> Loss:
    return -tokens.logps * weight, {}


against_reference.__dict__.update(reads=())


def of_values(tokens: Scalars) -> Loss:
    return tokens.scalars.square(), {}


@dataclass
class Ranks:
    """A group of ranks that computes with token ids and writes down what is asked of it, `world` for rank credit."""

    name: str
    log: list[str]
    ranks: int = 1
    reports: list[dict[str, float]] = field(default_factory=list)
    together: asyncio.Barrier | None = None  # an update ends when as many have begun
    failure: Exception | None = None
    seen: list[list[Batch]] = field(default_factory=list)  # of each update, what each rank learned from
    said: list[tuple[Any, ...]] = field(default_factory=list)  # of each call, what all ranks were told
    sent: list[Shard | Ref] = field(default_factory=list)  # of each call, what each rank was given

    @property
    def workers(self) -> Sequence[Any]:
        return range(self.ranks)

    async def call(self, method: str, *shared: Any, per_rank: Any = None, blocks: Any, **_: Any) -> list[Any]:
        if method == "hold":
            return [None] * self.ranks
        self.sent += per_rank
        shards = [_fetched(*pair) for pair in zip(per_rank, blocks, strict=True)]
        self.log.append(f"{self.name}.{method} begins")
        await asyncio.sleep(0)
        if self.together is not None:
            await asyncio.wait_for(self.together.wait(), SOON_S)
        if self.failure is not None:
            raise self.failure
        self.log.append(f"{self.name}.{method} ends")
        self.said.append(shared)
        self.seen.append([shard.batch for shard in shards])
        metrics = self.reports.pop(0) if self.reports else {"loss": 1.0}
        if method == "evaluate":
            return [metrics] * self.ranks
        report = UpdateReport(metrics, grad_norm=2.0, learning_rate=0.5, tokens=1, seconds={"forward": 3.0})
        return [report] * self.ranks

    async def call_split(
        self, method: str, *shared: Any, per_rank: Any, blocks: Any, **_: Any
    ) -> list[tuple[Any, Ref]]:
        self.log.append(f"{self.name}.{method} begins")
        await asyncio.sleep(0)
        self.sent += per_rank
        self.said.append(shared)
        found = [self._block(method, shared, _fetched(*pair).batch) for pair in zip(per_rank, blocks, strict=True)]
        self.log.append(f"{self.name}.{method} ends")
        return found

    def _block(self, method: str, shared: tuple[Any, ...], batch: Batch) -> tuple[Any, Ref]:
        if method == "credit":
            call, options, *_ = shared
            columns, metrics = call(batch, self, {}, **options)
            return metrics, Ref(Batch.build(batch.lengths, **columns))
        (into,), head, *_ = shared
        ids = batch["tokens"].astype(np.float32)
        return 0.0, Ref(Batch.build(batch.lengths, **{into: batch.sum_by_row(ids) if head.per_row else -ids}))

    async def kill(self) -> None: ...


def _fetched(sent: Shard | Ref, blocks: Sequence[Ref]) -> Shard:
    shard: Shard = sent.target if isinstance(sent, Ref) else sent
    return shard.fetched([block.target for block in blocks])


def table(rows: int = 6, length: int = 3) -> RowTable:
    """Rows in pairs; every token has an id of its own. The values per token lie in a block."""
    count = rows * length
    mask = np.tile(np.arange(length) > 0, rows)
    block = Batch.build([length] * rows, tokens=np.arange(count), mask=mask, sample_logps=np.zeros(count, np.float32))
    of_row = Batch.build(
        [length] * rows,
        group=np.arange(rows) // 2,
        reward=np.arange(rows, dtype=np.float32) % 2,
        truncated=[False] * rows,
    )
    return RowTable.of_block(of_row, Ref(block), {"tokens", "mask", "sample_logps"})


def executor(pipeline: Pipeline, *groups: Ranks, **settings: Any) -> Executor:
    return local_executor(pipeline, {group.name: group for group in groups}, token_budget=1000, **settings)


async def step(subject: Executor, rows: RowTable | None = None, number: int = 0) -> tuple[RowTable, dict[str, float]]:
    return await subject.run(batch_stages(subject.phase.pipeline), rows or table(), number)


@credits(reads={"ref_logps", "group"}, writes={"advantages"})
def from_reference(
    batch: Batch, world: Any, state: dict[str, Any], *, scale: float
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    assert world.ranks > 0
    return {"advantages": batch["ref_logps"] * scale}, {"scale": scale}


@credits(reads={"ref_logps"}, writes={"reward"})
def sum_of_reference(batch: Batch, world: Any, state: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    return {"reward": batch.sum_by_row(batch["ref_logps"]).astype(np.float32)}, {}


@credits(reads={"reward"}, writes={"advantages"})
def less_than_sum(rows: RowTable) -> dict[str, np.ndarray]:
    return {"advantages": rows["reward"] - 1}


ACTOR_CRITIC = Pipeline(
    Completions, update("policy", nll, reduce=token_mean), update("value", of_values, reduce=token_mean)
)


@pytest.mark.parametrize("concurrent", [True, False])
async def test_a_stage_that_reads_what_another_writes_waits_for_it(concurrent: bool) -> None:
    log: list[str] = []
    pipeline = Pipeline(
        Completions,
        infer("reference", into="ref_logps"),
        credit(from_reference, scale=2.0),
        infer("policy", into="old_logps"),
        update("policy", nll, reduce=token_mean),
    )
    await step(executor(pipeline, Ranks("reference", log), Ranks("policy", log), concurrent=concurrent))
    order = {line: index for index, line in enumerate(log)}
    assert order["reference.infer ends"] < order["policy.credit begins"]
    assert order["policy.credit ends"] < order["policy.infer begins"], "one role, one thing at a time"
    assert order["policy.infer ends"] < order["policy.update begins"]


async def test_stages_of_other_roles_run_at_the_same_time_where_each_has_its_own_resources() -> None:
    log, both = list[str](), asyncio.Barrier(2)
    await step(
        executor(ACTOR_CRITIC, Ranks("policy", log, together=both), Ranks("value", log, together=both), concurrent=True)
    )
    assert set(log[:2]) == {"policy.update begins", "value.update begins"}


async def test_on_shared_cores_stages_run_in_the_pipelines_order() -> None:
    log: list[str] = []
    await step(executor(ACTOR_CRITIC, Ranks("policy", log), Ranks("value", log), concurrent=False))
    assert log == ["policy.update begins", "policy.update ends", "value.update begins", "value.update ends"]


@pytest.mark.parametrize("concurrent", [True, False])
async def test_a_metric_that_two_roles_report_is_prefixed_with_the_role(concurrent: bool) -> None:
    policy = Ranks("policy", [], reports=[{"loss": 1.0, "entropy": 2.0}])
    value = Ranks("value", [], reports=[{"loss": 3.0, "explained_variance": 4.0}])
    _, metrics = await step(executor(ACTOR_CRITIC, policy, value, concurrent=concurrent))
    shared = {f"{role}/{name}": said for role in ("policy", "value") for name, said in STEP.items()}
    own = {"policy/loss": 1.0, "entropy": 2.0, "value/loss": 3.0, "explained_variance": 4.0}
    assert metrics == own | shared


STEP = {"grad_norm": 2.0, "learning_rate": 0.5, "time/forward": 3.0}


async def test_over_minibatches_and_epochs_times_are_summed_and_other_metrics_averaged() -> None:
    reports = [{"loss": loss} for loss in (1.0, 2.0, 3.0, 6.0)]
    policy = Ranks("policy", [], reports=reports)
    pipeline = Pipeline(Completions, update("policy", nll, reduce=token_mean, epochs=2, minibatches=2))
    _, metrics = await step(executor(pipeline, policy))
    assert metrics == {**STEP, "loss": 3.0, "time/forward": 12.0}


async def test_minibatches_are_whole_groups_each_once_an_epoch_in_an_order_that_seed_and_step_fix() -> None:
    pipeline = Pipeline(Completions, update("policy", nll, reduce=token_mean, epochs=2, minibatches=3))

    async def groups(number: int) -> list[list[int]]:
        policy = Ranks("policy", [])
        await step(executor(pipeline, policy), table(rows=12), number)
        return [batch["group"].tolist() for (batch,) in policy.seen]

    found = await groups(0)
    assert all(len(rows) == 4 and rows[0] == rows[1] and rows[2] == rows[3] for rows in found)
    for epoch in (found[:3], found[3:]):
        assert sorted(group for rows in epoch for group in rows) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert found == await groups(0)
    assert found != await groups(1)


@pytest.mark.parametrize("concurrent", [True, False])
async def test_the_error_of_a_stage_is_raised_as_itself(concurrent: bool) -> None:
    failing = Ranks("policy", [], failure=RunError("the gradient norm is nan"))
    with pytest.raises(RunError, match="the gradient norm is nan"):
        await step(executor(ACTOR_CRITIC, failing, Ranks("value", []), concurrent=concurrent))


async def test_a_stage_whose_predecessor_failed_does_not_run() -> None:
    log: list[str] = []
    pipeline = Pipeline(
        Completions, update("policy", nll, reduce=token_mean), update("policy", against_reference, reduce=token_mean)
    )
    failing = Ranks("policy", log, failure=RunError("out of memory"))
    with pytest.raises(RunError, match="out of memory"):
        await step(executor(pipeline, failing, concurrent=True))
    assert log == ["policy.update begins"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
async def test_columns_that_ranks_compute_are_in_the_order_of_the_rows(ranks: int) -> None:
    pipeline = Pipeline(
        Completions,
        infer("reference", into="ref_logps"),
        credit(from_reference, scale=2.0),
        update("policy", nll, reduce=token_mean),
    )
    subject = executor(pipeline, Ranks("reference", [], ranks), Ranks("policy", [], ranks))
    after, metrics = await step(subject)
    assert metrics["scale"] == 2.0
    assert (await subject.column("ref_logps", after)).tolist() == [-float(token) for token in range(18)]
    assert (await subject.column("advantages", after)).tolist() == [-2.0 * token for token in range(18)]


@pytest.mark.parametrize("ranks", [1, 2])
async def test_scores_per_row_are_in_the_drivers_table(ranks: int) -> None:
    pipeline = Pipeline(
        Completions,
        infer("reward_model", into="reward", head=Head.ROW_SCALAR),
        update("policy", nll, reduce=token_mean),
    )
    after, _ = await step(executor(pipeline, Ranks("reward_model", [], ranks), Ranks("policy", [])))
    assert after["reward"].tolist() == [3.0, 12.0, 21.0, 30.0, 39.0, 48.0]


@pytest.mark.parametrize("ranks", [1, 2, 3])
async def test_what_ranks_credit_to_rows_comes_into_the_drivers_table_for_later_stages(ranks: int) -> None:
    pipeline = Pipeline(
        Completions,
        infer("reference", into="ref_logps"),
        credit(sum_of_reference),
        credit(less_than_sum),
        update("policy", nll, reduce=token_mean),
    )
    after, _ = await step(executor(pipeline, Ranks("reference", [], ranks), Ranks("policy", [], ranks)))
    sums = [-3.0, -12.0, -21.0, -30.0, -39.0, -48.0]
    assert after["reward"].tolist() == sums
    assert after["advantages"].tolist() == [value - 1 for value in sums]


async def test_with_adapters_a_copy_of_the_policy_is_the_policy_without_them() -> None:
    pipeline = Pipeline(
        Completions,
        infer("reference", into="ref_logps"),
        infer("policy", into="old_logps"),
        update("policy", nll, reduce=token_mean),
    )
    policy = Ranks("policy", [])
    await step(executor(pipeline, policy, stand_ins={"reference": "policy"}))
    assert [(told[0], told[3]) for told in policy.said[:2]] == [(("ref_logps",), False), (("old_logps",), True)]


async def test_an_evaluation_updates_no_role_and_prefixes_metrics_with_roles() -> None:
    log: list[str] = []
    policy, value = Ranks("policy", log), Ranks("value", log)
    metrics = await executor(ACTOR_CRITIC, policy, value).evaluate(table())
    assert metrics == {"policy/loss": 1.0, "value/loss": 1.0}
    assert log == ["policy.evaluate begins", "policy.evaluate ends", "value.evaluate begins", "value.evaluate ends"]


@dataclass
class Counting(LocalObjects):
    """How many bytes the driver puts into the object store."""

    count: int = 0

    async def put(self, value: Any) -> Ref:
        self.count += len(pickle.dumps(value))
        return await super().put(value)


async def test_the_bytes_that_pass_through_the_driver_in_a_step_do_not_grow_with_the_number_of_tokens() -> None:
    """Of sampled groups; `Ranks` leave what they compute where it is."""
    pipeline = build("grpo", {"beta": 0.1, "updates_per_batch": 2})

    async def passed(length: int) -> int:
        objects = Counting()
        groups = [Ranks(role, [], 2) for role in pipeline.roles if role in pipeline.heads]
        subject = local_executor(
            pipeline, {group.name: group for group in groups}, token_budget=100 * length, objects=objects
        )
        after, _ = await step(subject, table(rows=8, length=length))
        assert after.num_tokens == 8 * length
        in_calls = [each for group in groups for each in group.sent if isinstance(each, Shard)]
        assert in_calls
        return objects.count + len(pickle.dumps([in_calls, after.rows, after.spread, after.stored]))

    few, many = await passed(10), await passed(5_000)
    assert many < 1.01 * few


@dataclass
class Published:
    """A publisher that writes down which versions it was to publish."""

    role: str
    source: str
    version: int = -1
    outdated: bool = False
    versions: list[int] = field(default_factory=list)

    async def publish(self, version: int) -> str:
        self.version, self.outdated = version, False
        self.versions.append(version)
        return f"{self.role} has {version}"

    def source_replaced(self) -> None:
        self.outdated = True


def test_weights_that_do_not_change_are_published_once_a_phase_and_the_others_in_every_step() -> None:
    student, teacher = Published("rollout", "policy"), Published("teacher_rollout", "teacher")
    pipeline = build("gkd", {"lmbda": 0.0, "seq_kd": True})
    executor = local_executor(pipeline, {}, token_budget=9, publishers=(student, teacher))

    async def published() -> list[Any]:
        begun = [await executor.publish(4, begins=True), await executor.publish(4)]
        return [*begun, *[await executor.publish(version) for version in (5, 6)]]

    assert asyncio.run(published()) == [
        ["rollout has 4", "teacher_rollout has 4"],
        [],
        ["rollout has 5"],
        ["rollout has 6"],
    ]
    assert (student.versions, teacher.versions) == ([4, 5, 6], [4])
    assert executor.group_stages.steady == {"teacher_rollout"}


def test_a_phase_publishes_a_version_again_only_of_the_role_that_was_given_other_weights() -> None:
    student, teacher = Published("rollout", "policy"), Published("teacher_rollout", "teacher")
    pipeline = build("gkd", {"lmbda": 0.0, "seq_kd": True})
    executor = local_executor(pipeline, {}, token_budget=9, publishers=(student, teacher))

    async def published() -> list[Any]:
        begun = [await executor.publish(4, begins=True), await executor.publish(4, begins=True)]
        executor.replaced("teacher")
        within = await executor.publish(4)
        return [*begun, within, await executor.publish(4, begins=True), await executor.publish(4, begins=True)]

    both, again = ["rollout has 4", "teacher_rollout has 4"], ["teacher_rollout has 4"]
    assert asyncio.run(published()) == [both, [], [], again, []]
