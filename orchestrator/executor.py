"""Turns stages into calls: the only module that knows which processes a verb calls, and how.

    collector ── run_group(stage, group) ──► pools of engines and scorers (`collection/group_stages.py`)
    loop ─────── run(stages, table) ───────► groups of ranks (policy, reference, value ...), several at once
    loop ─────── publish(version) ─────────► publishers: a trained role ──► every engine that samples from it

The pipeline decides which stages there are, their order and their roles.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from actors.batch import Array
from actors.columns import COLUMNS, Axis, Head
from actors.distributions import TopK
from actors.worker import Group, Objects, Ref
from orchestrator.cluster.pool import Pool
from orchestrator.collection.group_stages import GroupStages, PromptGroup
from orchestrator.collection.model_scorer import ModelScorer
from orchestrator.losses.objective import LossObjective
from orchestrator.pipeline import DRIVER, GROUPWISE, Pipeline, Stage, Verb, in_conflict, infer
from orchestrator.planning.prepared import ModelReward
from orchestrator.publishing.publisher import Publisher, SyncReport
from orchestrator.publishing.transfer import mix_towards
from orchestrator.row_table import RowTable, Share
from rollout.sampling import Sampling

Clock = Callable[[str], AbstractContextManager[None]]
FETCH_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class PhaseSettings:
    """What the stages of the current phase need to know besides their own options."""

    pipeline: Pipeline
    token_budget: int
    temperature: float  # at which log-probabilities are taken
    seed: int
    sampling: Sampling
    vocabulary: int | None = None  # entries of a model's vocabulary that stand for tokens; None: all of them


@dataclass(frozen=True)
class Written:
    """What a batch stage adds to a table: values per row, or columns that lie in blocks."""

    values: Mapping[str, Array] = field(default_factory=dict[str, Array])
    names: frozenset[str] = frozenset()
    parts: tuple[tuple[Array, Ref], ...] = ()

    def added_to(self, table: RowTable) -> RowTable:
        table = table.with_values(**self.values) if self.values else table
        return table.with_blocks(self.names, self.parts) if self.names else table


NOTHING = Written()


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
        model_rewards: Sequence[ModelReward],
        publishers: Sequence[Publisher],
        call_timeout_s: Mapping[str, float],
        stand_ins: Mapping[str, str],
        concurrent: bool,
    ) -> None:
        self.groups, self.objects = groups, objects
        self.publishers, self._start = publishers, start
        models = {reward: ModelScorer(partial(self.scores, reward.role)) for reward in model_rewards}
        self.group_stages = GroupStages(engines, scorers, models, objects)
        self._call_timeout_s, self._stand_ins, self._concurrent = call_timeout_s, stand_ins, concurrent
        self._phase: PhaseSettings | None = None
        self._verbs: dict[Verb, Callable[[Stage, RowTable, int], Awaitable[tuple[Written, dict[str, float]]]]] = {
            Verb.INFER: self._infer,
            Verb.CREDIT: self._credit,
            Verb.UPDATE: self._update,
            Verb.MIX: self._mix,
        }

    @property
    def pools(self) -> Mapping[str, Pool]:
        """The elastic roles."""
        return {**self.group_stages.engines, **self.group_stages.scorers}

    @property
    def paused(self) -> bool:
        """Whether a pool was resized to no workers."""
        return any(pool.paused for pool in self.pools.values())

    def enter(self, phase: PhaseSettings) -> None:
        """Stages run with these settings from now on."""
        self._phase = phase
        changing = {*phase.pipeline.trained, *phase.pipeline.mixed}
        self.group_stages.steady = frozenset(each.role for each in self.publishers if each.source not in changing)

    @property
    def phase(self) -> PhaseSettings:
        assert self._phase is not None, "enter() a phase first"
        return self._phase

    def ranks(self, stage: Stage) -> int:
        """Processes that share the work of a stage."""
        return len(self._group_of(stage)[1].workers)

    async def start(self, role: str, model: str) -> None:
        """Start a role that could not start with the others, with the model in that folder."""
        await self._start(role, model)

    async def release(self, role: str) -> None:
        """End the processes of a role that no later stage needs, so that its memory is free."""
        await self.groups.pop(role).kill()

    async def run_group(self, stage: Stage, group: PromptGroup) -> PromptGroup | None:
        """One group-wise stage: see `GroupStages.run`."""
        return await self.group_stages.run(stage, group, self.phase.sampling)

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
            with clock(stage.name):
                written, metrics = await self._verbs[stage.verb](stage, table, step)
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
        ranks = self._carried_out_by(later)
        busy = ranks is not None and ranks == self._carried_out_by(earlier)
        return not self._concurrent or busy or in_conflict(later, earlier)

    def _carried_out_by(self, stage: Stage) -> str | None:
        """The role whose ranks do the work; None for the driver."""
        if stage.role != DRIVER:
            return stage.role if stage.role in self.groups else self._stand_ins.get(stage.role)
        return self.phase.pipeline.trained[0] if stage.verb is Verb.CREDIT and stage.reads_tokens else None

    async def run_batch_stages(self, table: RowTable) -> RowTable:
        """The batch-wise stages of the collecting part. Those that a trained role's own processes carry out wait until
        these are neither updated nor published: queued behind each other there, the deadlines of both would run."""
        stages = self.phase.pipeline.batch_stages
        shared = any(self._stand_ins.get(stage.role) in self.phase.pipeline.trained for stage in stages)
        async with self.changing_weights() if shared else nullcontext():
            return (await self.run(stages, table))[0]

    async def evaluate(self, table: RowTable) -> dict[str, float]:
        """What the phase's updates would report of a batch, without learning from it: the stages before them run as in
        a step, and no weights change."""
        left_out = GROUPWISE | {Verb.UPDATE, Verb.MIX}  # the rows are there
        stages = [stage for stage in self.phase.pipeline if stage.verb not in left_out]
        table, _ = await self.run([stage for stage in stages if not stage.precomputed], table)
        reports: list[tuple[Stage, dict[str, float]]] = []
        for stage in self.phase.pipeline.updates:
            objective = LossObjective.of(stage)
            found = await self._on_every_rank("evaluate", stage, _read(table, objective), objective, step=-1)
            reports.append((stage, _with_margins(found[0])))
        return _named_by_role(reports)

    async def scores(self, role: str, table: RowTable) -> Array:
        """[B] float32: what a role's model says of rows, as a reward. The scores of a group do not depend on the other
        groups in the table."""
        stage = infer(role, into="reward", head=Head.ROW_SCALAR)
        written, _ = await self._infer(stage, table, step=-1, groups_apart=True)
        return written.values["reward"]

    async def column(self, name: str, table: RowTable) -> Array:
        """[T]: the values of a column per token, brought into the driver. For what is kept, not for what is trained."""
        whole = table.only({name}).whole()
        return whole.shard.fetched(await self.fetch(whole.blocks)).batch[name]

    async def fetch(self, refs: Sequence[Ref]) -> list[Any]:
        """What refs stand for, brought into the driver."""
        return list(await asyncio.gather(*(self.objects.get(ref, timeout_s=FETCH_TIMEOUT_S) for ref in refs)))

    @asynccontextmanager
    async def changing_weights(self) -> AsyncIterator[None]:
        """Hold this while a role is updated and published: no worker catches up with half-way weights meanwhile."""
        async with AsyncExitStack() as stack:
            for publisher in self.publishers:
                await stack.enter_async_context(publisher.changing)
            yield

    async def publish(self, version: int, *, begins: bool = False) -> SyncReport | None:
        """Bring the engines to the weights of the roles that they sample from, unless they are there. Where those do
        not change in the phase, that is once, when it `begins`. The caller holds them still (`changing_weights`). The
        last report; None if there was nothing to do."""
        report = None
        for publisher in self.publishers:
            if publisher.version != version and (begins or publisher.role not in self.group_stages.steady):
                report = await publisher.publish(version)
        return report

    async def _infer(
        self, stage: Stage, table: RowTable, step: int, *, groups_apart: bool = False
    ) -> tuple[Written, dict[str, float]]:
        into, head = stage.options["into"], stage.options["head"]
        temperature = stage.options.get("temperature", self.phase.temperature)
        top_k = TopK(stage.top_k, temperature, self.phase.vocabulary) if stage.top_k is not None else None
        role, group = self._group_of(stage)
        adapters = role == stage.role and bool(stage.options["adapters"])
        read = table.only({"tokens", "mask", "group", "learned"})
        cut = read.shard_groups if groups_apart else read.shard
        shares = cut(len(group.workers), self.phase.token_budget)
        asked = into, head, temperature, adapters, top_k
        found = await self._call_split(stage, role, group, "infer", shares, *asked, step=step)
        return await self._computed(stage.writes, shares, found, per_row=head.per_row), {}

    async def _credit(self, stage: Stage, table: RowTable, step: int) -> tuple[Written, dict[str, float]]:
        assert stage.call is not None
        if not stage.reads_tokens:
            return Written(values=stage.call(table, **stage.options)), {}
        role = self.phase.pipeline.trained[0]
        group = self.groups[role]
        shares = table.only({"group", "learned", *stage.reads}).shard(len(group.workers), self.phase.token_budget)
        name = f"{stage.name} {getattr(stage.call, '__qualname__', type(stage.call).__name__)}"
        asked = stage.call, dict(stage.options), name, step >= 0
        found = await self._call_split(stage, role, group, "credit", shares, *asked, step=step)
        per_row = all(COLUMNS[name].axis is Axis.ROW for name in stage.writes)
        return await self._computed(stage.writes, shares, found, per_row=per_row), found[0][0]

    async def _computed(
        self,
        names: set[str] | frozenset[str],
        shares: Sequence[Share],
        found: Sequence[tuple[Any, Ref]],
        *,
        per_row: bool,
    ) -> Written:
        """Columns that ranks computed of their shares. Values per token stay where they are, values per row come into
        the driver's table."""
        if not per_row:
            parts = ((share.rows, ref) for share, (_, ref) in zip(shares, found, strict=True))
            return Written(names=frozenset(names), parts=tuple(parts))
        blocks = await self.fetch([ref for _, ref in found])
        values = {name: np.zeros(sum(map(len, blocks)), COLUMNS[name].dtype) for name in names}
        for share, block in zip(shares, blocks, strict=True):
            for name in names:
                values[name][share.rows] = block[name]
        return Written(values=values)

    async def _update(self, stage: Stage, table: RowTable, step: int) -> tuple[Written, dict[str, float]]:
        """One optimizer step per minibatch and epoch; metrics are means over them, times sums."""
        objective = LossObjective.of(stage)
        needed = _read(table, objective)
        reports: list[dict[str, float]] = []
        for epoch in range(stage.options["epochs"]):
            for rows in _minibatches(needed, stage.options["minibatches"], (self.phase.seed, step, epoch)):
                part = needed.select(rows) if rows is not None else needed
                first = (await self._on_every_rank("update", stage, part, objective, step))[0]
                seconds = {f"time/{name}": value for name, value in first.seconds.items()}
                steps = {"grad_norm": first.grad_norm, "learning_rate": first.learning_rate}
                reports.append({**_with_margins(first.metrics), **steps, **seconds})
        return NOTHING, _over_minibatches(reports)

    async def _on_every_rank(
        self, method: str, stage: Stage, table: RowTable, objective: LossObjective, step: int
    ) -> list[Any]:
        """`update` or `evaluate`: each rank has its share of the batch, and answers for all of it."""
        group = self.groups[stage.role]
        shares = table.shard(
            len(group.workers),
            self.phase.token_budget,
            keep_groups=objective.keep_groups,
            statistics_rows=objective.statistics_rows,
        )
        return await group.call(
            method,
            objective,
            self.phase.temperature,
            stage.name,
            per_rank=await self._put(shares),
            blocks=[share.blocks for share in shares],
            timeout_s=self._call_timeout_s[stage.role],
            task_name=_label(stage, step),
        )

    async def _mix(self, stage: Stage, table: RowTable, step: int) -> tuple[Written, dict[str, float]]:
        """Move a role's weights towards those of the source as this step leaves them, if it is such a step."""
        if (step + 1) % stage.options["every"] == 0:
            await mix_towards(
                self.groups[stage.options["source"]],
                self.groups[stage.role],
                stage.options["share"],
                timeout_s=max(self._call_timeout_s[role] for role in (stage.role, stage.options["source"])),
                task_name=_label(stage, step),
            )
        return NOTHING, {}

    def _group_of(self, stage: Stage) -> tuple[str, Group]:
        role = stage.role if stage.role in self.groups else self._stand_ins[stage.role]
        return role, self.groups[role]

    async def _put(self, shares: Sequence[Share]) -> list[Ref]:
        return list(await asyncio.gather(*(self.objects.put(share.shard) for share in shares)))

    async def _call_split(
        self, stage: Stage, role: str, group: Group, method: str, shares: Sequence[Share], *shared: Any, step: int
    ) -> list[tuple[Any, Ref]]:
        """A method that leaves a block with each rank's values in the object store."""
        return await group.call_split(
            method,
            *shared,
            per_rank=await self._put(shares),
            blocks=[share.blocks for share in shares],
            timeout_s=self._call_timeout_s[role],
            task_name=_label(stage, step),
        )


def _over_minibatches(reports: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of what the minibatches report; seconds add up."""
    names = dict.fromkeys(name for report in reports for name in report)
    each = {name: [report[name] for report in reports if name in report] for name in names}
    return {name: float(np.sum(v) if name.startswith("time/") else np.mean(v)) for name, v in each.items()}


def _named_by_role(reports: Sequence[tuple[Stage, Mapping[str, float]]]) -> dict[str, float]:
    """All metrics. A name that two roles report is preceded by the role."""
    reported = {(stage.role, name) for stage, metrics in reports for name in metrics}
    roles = Counter(name for _, name in reported)
    return {
        f"{stage.role}/{name}" if roles[name] > 1 else name: value
        for stage, metrics in reports
        for name, value in metrics.items()
    }


def _with_margins(metrics: dict[str, float]) -> dict[str, float]:
    """By how much what is chosen (or desirable) is rewarded above the rest. Losses over pairs report it themselves; of
    unpaired rows each micro-batch knows its own only, so it is made of the two sides' means over all of them."""
    chosen, rejected = metrics.get("rewards/chosen"), metrics.get("rewards/rejected")
    return metrics if chosen is None or rejected is None else {"rewards/margins": chosen - rejected, **metrics}


def _read(table: RowTable, objective: LossObjective) -> RowTable:
    """The columns that a trainer needs of a batch."""
    missing = objective.columns - table.columns
    assert not missing, f"the pipeline was checked to write {sorted(missing)}"
    return table.only({"tokens", "mask", "group", "learned", *objective.columns})


def _minibatches(table: RowTable, count: int, seed: tuple[int, int, int]) -> Iterator[Array | None]:
    """Row indices of each minibatch: groups stay whole, dealt in an order that (seed, step, epoch) fixes."""
    if count == 1:
        yield None
        return
    groups = np.unique(table["group"])
    shuffled = np.random.default_rng([value + 1 for value in seed]).permutation(groups)
    for part in np.array_split(shuffled, count):
        yield np.flatnonzero(np.isin(table["group"], part))


def _label(stage: Stage, step: int) -> str:
    return f"{stage.name} step {step}" if step >= 0 else stage.name


@asynccontextmanager
async def _first_error_of_a_group() -> AsyncIterator[None]:
    """Raises the first error of a task group instead of the exception group."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
