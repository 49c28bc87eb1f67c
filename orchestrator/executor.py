"""Carries out the stages of a pipeline, each by the processes that its verb calls for.

    collector ── run_group(stage, group) ──► pools of engines and scorers (`collection/group_stages.py`)
    loop ─────── run(stages, table) ───────► groups of ranks (`batch_stages.py`), several stages at once
    loop ─────── publish(version) ─────────► publishers: a trained role ──► every engine that samples from it

The pipeline decides which stages there are, their order and their roles.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from functools import partial
from typing import Any

from actors.batch import Array
from actors.errors import BlockLost
from actors.worker import Group, Objects, Ref
from orchestrator.activity import PUBLISH, Activity
from orchestrator.batches.batch_stages import BatchStages, PhaseSettings
from orchestrator.batches.row_table import RowTable
from orchestrator.cluster.pool import Pool
from orchestrator.collection.group_stages import GroupStages, PromptGroup
from orchestrator.collection.model_scorer import ModelScorer
from orchestrator.pipeline import GROUPWISE, Stage, Verb, in_conflict
from orchestrator.planning.prepared import ModelReward
from orchestrator.publishing.publisher import Publisher, SyncReport
from rewards.judge import JudgeSpec

Clock = Callable[[str], AbstractContextManager[None]]


class Executor:
    """Groups of ranks by role, pools by role, and the publishers between them.

    `stand_ins` says which group serves a role that has none of its own: with adapters, the policy without them *is* the
    reference. `concurrent`: stages that do not depend on one another run at the same time."""

    def __init__(
        self,
        groups: dict[str, Group],
        objects: Objects,
        *,
        start: Callable[[str, str], Awaitable[None]],
        engines: Mapping[str, Pool],
        scorers: Mapping[str, Pool],
        environments: Mapping[str, Pool] | None = None,
        model_rewards: Sequence[ModelReward],
        publishers: Sequence[Publisher],
        call_timeout_s: Mapping[str, float],
        stand_ins: Mapping[str, str],
        concurrent: bool,
        judges: Sequence[JudgeSpec] = (),
    ) -> None:
        self.groups, self.objects = groups, objects
        self.publishers, self._start = publishers, start
        self.activity = Activity()
        self.batch_stages = BatchStages(
            groups, objects, call_timeout_s=call_timeout_s, stand_ins=stand_ins, engines=engines
        )
        asked = dict.fromkeys((role, reward.steps) for reward in model_rewards for role in reward.roles)
        scores = self.batch_stages.scores
        scorers_of = {(role, steps): ModelScorer(partial(scores, role, steps=steps)) for role, steps in asked}
        models = {each: [scorers_of[role, each.steps] for role in each.roles] for each in model_rewards}
        self.group_stages = GroupStages(engines, scorers, models, objects, environments, judges)
        self._stand_ins, self._concurrent = stand_ins, concurrent

    @property
    def pools(self) -> Mapping[str, Pool]:
        """The elastic roles."""
        return {**self.group_stages.engines, **self.group_stages.scorers, **self.group_stages.episodes.environments}

    @property
    def engines(self) -> Mapping[str, Pool]:
        """The elastic roles that sample."""
        return self.group_stages.engines

    @property
    def paused(self) -> bool:
        """Whether a pool was resized to no workers."""
        return any(pool.paused for pool in self.pools.values())

    def enter(self, phase: PhaseSettings) -> None:
        """Stages run with these settings from now on."""
        self.batch_stages.enter(phase)
        self.group_stages.episodes.settings = phase.episode
        changing = {*phase.pipeline.trained, *phase.pipeline.mixed}
        followed = {each.role for each in self.publishers}
        self.group_stages.steady = frozenset(
            followed - {each.role for each in self.publishers if each.source in changing}
        )

    @property
    def phase(self) -> PhaseSettings:
        return self.batch_stages.phase

    def ranks(self, stage: Stage) -> int:
        """Processes that share the work of a batch stage."""
        return self.batch_stages.ranks(stage)

    async def start(self, role: str, model: str) -> None:
        """Start a role that could not start with the others, with the model in that folder."""
        await self._start(role, model)

    async def release(self, role: str) -> None:
        """End the processes of a role that no later stage needs, so that its memory is free."""
        await self.groups.pop(role).kill()

    async def run_group(self, stage: Stage, group: PromptGroup) -> PromptGroup | None:
        """One group-wise stage: see `GroupStages.run`."""
        with self.activity.working(stage):
            return await self.group_stages.run(stage, group, self.phase.sampling)

    async def lost(self, tables: Sequence[RowTable]) -> list[bool]:
        """Which of the tables have blocks that are gone with their node. The blocks of the others are on the nodes of
        the first trained role's ranks afterwards, where the loss of another node does not matter."""
        try:
            await self.batch_stages.held(RowTable.concat(tables))
        except BlockLost:
            each = await asyncio.gather(*map(self.batch_stages.held, tables), return_exceptions=True)
            if other := next((found for found in each if found and not isinstance(found, BlockLost)), None):
                raise other from None
            return [found is not None for found in each]
        return [False] * len(tables)

    async def run(
        self, stages: Sequence[Stage], table: RowTable, step: int = -1, clock: Clock | None = None
    ) -> tuple[RowTable, dict[str, float]]:
        """Batch-wise stages: the table with the columns that they write, and their metrics. Each waits for the earlier
        ones that it is in conflict with."""
        clock = clock or (lambda _: nullcontext())
        tasks: list[asyncio.Task[dict[str, float]]] = []

        async def run_one(stage: Stage, after: list[asyncio.Task[Any]]) -> dict[str, float]:
            nonlocal table
            if after:
                await asyncio.wait(after)
            with clock(stage.name), self.activity.working(stage):
                written, metrics = await self.batch_stages.run(stage, table, step)
            table = written.added_to(table)
            return metrics

        async with _first_error_of_a_group(), asyncio.TaskGroup() as running:
            for index, stage in enumerate(stages):
                earlier = zip(tasks, stages)
                after = [task for task, other in earlier if self._in_order(other, stage)]
                tasks.append(running.create_task(run_one(stage, after), name=f"{index} {stage.name}"))
        reports = [(stage, task.result()) for stage, task in zip(stages, tasks, strict=True)]
        return table, _named_by_role(reports)

    def _in_order(self, earlier: Stage, later: Stage) -> bool:
        """Whether a stage waits for an earlier one; also if the same ranks carry out both, where its call would queue
        with its deadline running."""
        ranks = self.batch_stages.carried_out_by(later)
        busy = ranks is not None and ranks == self.batch_stages.carried_out_by(earlier)
        return not self._concurrent or busy or in_conflict(later, earlier)

    async def run_batch_stages(self, table: RowTable) -> RowTable:
        """The batch-wise stages of the collecting part. Those that a trained role's own processes carry out wait until
        these are neither updated nor published: queued behind each other there, the deadlines of both would run."""
        stages = self.phase.pipeline.batch_stages
        shared = any(self._stand_ins.get(stage.role) in self.phase.pipeline.trained for stage in stages)
        async with self.changing_weights() if shared else nullcontext():
            return (await self.run(stages, table))[0]

    async def evaluate(self, table: RowTable) -> dict[str, float]:
        """What the phase's updates would report of a batch, without learning from it: the stages before them run as in
        a step, and no weights change. Who wants the weights from the trained ranks waits until they are free."""
        left_out = GROUPWISE | {Verb.UPDATE, Verb.MIX, Verb.REPLAY, Verb.WRITE}  # the rows are there
        pipeline = self.phase.pipeline
        table = await self.run_batch_stages(table)
        async with self.changing_weights():
            stages = [stage for stage in pipeline.learn if stage.verb not in left_out and not stage.precomputed]
            table, _ = await self.run(stages, table)
            found = [(stage, await self.batch_stages.evaluate(stage, table)) for stage in pipeline.updates]
        return _named_by_role(found)

    async def column(self, name: str, table: RowTable) -> Array:
        """[T]: the values of a column per token, brought into the driver. For what is kept, not for what is trained."""
        whole = table.only({name}).whole()
        return whole.shard.fetched(await self.fetch(whole.blocks)).batch[name]

    async def fetch(self, refs: Sequence[Ref]) -> list[Any]:
        """What refs stand for, brought into the driver."""
        return await self.batch_stages.fetch(refs)

    @asynccontextmanager
    async def changing_weights(self) -> AsyncIterator[None]:
        """Hold this while a role is updated and published: no worker catches up with half-way weights meanwhile."""
        async with AsyncExitStack() as stack:
            for publisher in self.publishers:
                await stack.enter_async_context(publisher.changing)
            yield

    def replaced(self, role: str) -> None:
        """A role was given other weights between two steps: engines that sample from it get them with the next publish,
        also if no step has been done since the last one. The caller holds them still (`changing_weights`)."""
        for publisher in self.publishers:
            if publisher.source == role:
                publisher.source_replaced()

    async def publish(self, version: int, *, begins: bool = False) -> list[SyncReport]:
        """Bring the engines to the weights of the roles that they sample from, unless they are there. Where those do
        not change in the phase, that is once, when it `begins`. The caller holds them still (`changing_weights`)."""
        reports: list[SyncReport] = []
        for publisher in self.publishers:
            changes = publisher.source in {*self.phase.pipeline.trained, *self.phase.pipeline.mixed}
            if (publisher.outdated or publisher.version != version) and (begins or changes):
                with self.activity.working(PUBLISH):
                    reports.append(await publisher.publish(version))
        return reports


def _named_by_role(reports: Sequence[tuple[Stage, Mapping[str, float]]]) -> dict[str, float]:
    """All metrics. A name that two roles report is preceded by the role."""
    reported = {(stage.role, name) for stage, metrics in reports for name in metrics}
    roles = Counter(name for _, name in reported)
    return {
        f"{stage.role}/{name}" if roles[name] > 1 else name: value
        for stage, metrics in reports
        for name, value in metrics.items()
    }


@asynccontextmanager
async def _first_error_of_a_group() -> AsyncIterator[None]:
    """Raises the first error of a task group instead of the exception group."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
