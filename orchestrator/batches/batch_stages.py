"""The batch-wise stages: what the ranks of groups do with a batch, and the driver with its table.

infer, update ──► the ranks of the stage's role      credit ──► the driver; the ranks of the first trained role, if it
mix ────────────► the ranks of two roles                        reads values per token
replay ─────────► the driver, which keeps groups of earlier batches (`replay_buffer.py`)
write ──────────► the driver, which adds completions to the data set that the phase makes (`written_data.py`)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from actors.batch import Array
from actors.columns import COLUMNS, Axis, Head
from actors.distributions import TopK
from actors.other_prompts import OtherPrompts
from actors.sharding import Shard
from actors.worker import Group, Objects, Ref, Worker
from orchestrator.batches.replay_buffer import ReplayBuffer, replayed
from orchestrator.batches.row_table import RowTable, Share
from orchestrator.batches.split_episodes import by_episode
from orchestrator.batches.written_data import Output
from orchestrator.cluster.pool import Pool
from orchestrator.credit.step_rewards import Steps, reward_of_steps, rewards_of_steps
from orchestrator.losses.objective import LossObjective
from orchestrator.pipeline import DRIVER, Pipeline, Stage, Verb, credit, infer
from orchestrator.planning.episode_settings import EpisodeSettings
from orchestrator.publishing.transfer import mix_towards
from rollout.sampling import Sampling

FETCH_TIMEOUT_S = 120.0
# Of a shard that travels in the call of its rank: through the object store the call takes 1.7 ms longer (of 7, beside
# what the rank computes). Ray takes at most 100 KiB into a call; anything larger it puts into the store, and the event
# loop stands still meanwhile.
SMALL_SHARD_BYTES = 64 * 1024


@dataclass(frozen=True)
class PhaseSettings:
    """What the stages of the current phase need to know besides their own options."""

    pipeline: Pipeline
    token_budget: int
    temperature: float  # at which log-probabilities are taken
    seed: int
    sampling: Sampling
    vocabulary: int | None = None  # entries of a model's vocabulary that stand for tokens; None: all of them
    episode: EpisodeSettings | None = None  # how its samples talk to an environment, if they do
    output: Output | None = None  # the data set that the phase makes, if it makes one
    tokenizers: Mapping[str, OtherPrompts] = field(default_factory=dict[str, OtherPrompts])  # of roles with their own


@dataclass(frozen=True)
class Written:
    """What a batch stage makes of a table: values per row, or columns that lie in blocks, or other rows."""

    values: Mapping[str, Array] = field(default_factory=dict[str, Array])
    names: frozenset[str] = frozenset()
    parts: tuple[tuple[Array, Ref], ...] = ()
    beside: bool = False  # what the columns of `parts` hold is added to what they held
    instead: RowTable | None = None  # of the table, with other rows

    def added_to(self, table: RowTable) -> RowTable:
        table = table if self.instead is None else self.instead
        table = table.with_values(**self.values) if self.values else table
        return table.with_blocks(self.names, self.parts, beside=self.beside) if self.names else table


NOTHING = Written()


class BatchStages:
    """Batch-wise stages on the groups of ranks, by role, and on the engines of a role that says its likeliest tokens.

    `stand_ins` says which group serves a role that has none of its own: with adapters, the policy without them *is* the
    reference."""

    def __init__(
        self,
        groups: Mapping[str, Group],
        objects: Objects,
        *,
        call_timeout_s: Mapping[str, float],
        stand_ins: Mapping[str, str],
        engines: Mapping[str, Pool] | None = None,
    ) -> None:
        self._groups, self._objects, self._engines = groups, objects, engines or {}
        self._call_timeout_s, self._stand_ins = call_timeout_s, stand_ins
        self._phase: PhaseSettings | None = None
        self._verbs: dict[Verb, Callable[[Stage, RowTable, int], Awaitable[tuple[Written, dict[str, float]]]]] = {
            Verb.INFER: self._infer,
            Verb.CREDIT: self._credit,
            Verb.UPDATE: self._update,
            Verb.MIX: self._mix,
            Verb.REPLAY: self._replay,
            Verb.WRITE: self._write,
        }
        self.replay_buffer: ReplayBuffer | None = None  # of the phase, if a stage of it replays

    def enter(self, phase: PhaseSettings) -> None:
        """Stages run with these settings from now on; nothing of an earlier phase is replayed."""
        self._phase = phase
        sizes = [stage.options["size"] for stage in phase.pipeline if stage.verb is Verb.REPLAY]
        self.replay_buffer = ReplayBuffer(sizes[0]) if sizes else None

    @property
    def phase(self) -> PhaseSettings:
        assert self._phase is not None, "enter() a phase first"
        return self._phase

    async def run(self, stage: Stage, table: RowTable, step: int) -> tuple[Written, dict[str, float]]:
        """What the stage adds to the table, and its metrics. `step`: -1 outside of the steps of training."""
        return await self._verbs[stage.verb](stage, table, step)

    async def evaluate(self, stage: Stage, table: RowTable) -> dict[str, float]:
        """What an update stage would report of the batch, without learning from it."""
        objective = LossObjective.of(stage)
        found = await self._on_every_rank("evaluate", stage, _read(table, objective, stage), objective, step=-1)
        return _with_margins(found[0])

    async def scores(self, role: str, table: RowTable, *, steps: Steps | None = None) -> RowTable:
        """The column `reward` of the same rows: what a role's model says of them; with `steps`, what it says of their
        steps, which become one number where the tokens are, and if each step keeps its own, the column
        `process_reward`. What is said of a group does not depend on the other groups in the table."""
        into, head = ("reward", Head.ROW_SCALAR) if steps is None else ("step_reward", Head.STEP_SCALAR)
        written, _ = await self._infer(infer(role, into=into, head=head), table, step=-1, groups_apart=True)
        found = written.added_to(table)
        if steps is not None:
            calls = (reward_of_steps, rewards_of_steps) if steps.aggregate == "each" else (reward_of_steps,)
            for call in calls:
                stage = replace(credit(call, steps=steps), role=role)
                found = (await self._credit_of(stage, role, found))[0].added_to(found)
        return found.only({"reward", "process_reward"})

    async def fetch(self, refs: Sequence[Ref]) -> list[Any]:
        """What refs stand for, brought into the driver."""
        return list(await asyncio.gather(*(self._objects.get(ref, timeout_s=FETCH_TIMEOUT_S) for ref in refs)))

    async def held(self, table: RowTable) -> None:
        """Brings the blocks of a table to the nodes of the first trained role's ranks, as these will read them; where
        nothing is trained, to the driver. Raises BlockLost if one is gone."""
        if not self.phase.pipeline.trained:
            await self.fetch(table.only({"tokens", "mask"}).whole().blocks)
            return
        role = self.phase.pipeline.trained[0]
        shares = table.only({"tokens", "mask", "process_reward"}).shard(
            len(self._groups[role].workers), self.phase.token_budget
        )
        await self._hold(role, shares)

    async def _hold(self, role: str, shares: Sequence[Share]) -> None:
        blocks, deadline = [share.blocks for share in shares], self._call_timeout_s[role]
        await self._groups[role].call("hold", blocks=blocks, timeout_s=deadline, task_name=f"{role}.hold")

    def ranks(self, stage: Stage) -> int:
        """Processes that share the work of a stage."""
        return len(self._group_of(stage)[1].workers)

    def carried_out_by(self, stage: Stage) -> str | None:
        """The role whose ranks do the work; None for the driver."""
        if stage.role != DRIVER:
            return stage.role if stage.role in self._groups else self._stand_ins.get(stage.role)
        return self.phase.pipeline.trained[0] if stage.verb is Verb.CREDIT and stage.reads_tokens else None

    async def _infer(
        self, stage: Stage, table: RowTable, step: int, *, groups_apart: bool = False
    ) -> tuple[Written, dict[str, float]]:
        into, head = stage.options["into"], stage.options["head"]
        temperature = stage.options.get("temperature") or self.phase.temperature
        vocabulary = None if stage.retokenised else self.phase.vocabulary
        top_k = TopK(stage.top_k, temperature, vocabulary) if stage.top_k is not None else None
        if stage.role in self._engines:
            return await self._infer_by_engine(stage, table), {}
        role, group = self._group_of(stage)
        adapters = role == stage.role and bool(stage.options["adapters"])
        read = table.only({"tokens", "mask", "group", "learned", *stage.reads})
        read = read.without({"learned"}) if stage.other_prompts else read  # who is not learned from may be shown
        rows = np.arange(len(table)) if stage.only is None else np.flatnonzero(table[stage.only[0]] == stage.only[1])
        if not len(rows):
            return NOTHING, {}  # no rank is asked
        read = read if stage.only is None else read.select(rows)
        cut = read.shard_groups if groups_apart else read.shard
        cut = read.shard_behind_teacher_prompts if stage.other_prompts else cut
        shares = cut(len(group.workers), self.phase.token_budget)
        asked = into, head, temperature, adapters, top_k, self._other_prompts(stage)
        if len(group.workers) > 1:
            # In ZeRO stage 3 a pass gathers weights, so no rank may begin one until all ranks have their rows.
            await self._hold(role, shares)
        found = await self._call_split(stage, role, group, "infer", shares, *asked, step=step)
        shares = [replace(share, rows=rows[share.rows]) for share in shares]
        written = await self._computed(stage.writes, shares, found, per_row=head.per_row)
        return replace(written, beside=bool(stage.options.get("beside"))), {}

    def _other_prompts(self, stage: Stage) -> OtherPrompts | None:
        if not stage.other_prompts:
            return None
        return self.phase.tokenizers[stage.role] if stage.retokenised else OtherPrompts()

    async def _infer_by_engine(self, stage: Stage, table: RowTable) -> Written:
        """The likeliest tokens, from a pool of engines: a prompt group is one call."""
        pool = self._engines[stage.role]
        rows = np.arange(len(table)) if stage.only is None else np.flatnonzero(table[stage.only[0]] == stage.only[1])
        if not len(rows):
            return NOTHING
        read, group = table.only({"tokens", "mask", *stage.reads}), table["group"]
        parts = [rows[group[rows] == each] for each in dict.fromkeys(group[rows].tolist())]

        async def said(members: Array) -> Ref:
            name = f"{stage.name} {int(group[members[0]])}"
            share = read.select(members).whole()

            async def work(worker: Worker) -> Ref:
                asked = name, share.shard, stage.options["into"], stage.top_k, self.phase.vocabulary
                deadline = pool.policy.call_timeout_s
                _, block = await worker.call_split("top_k", *asked, *share.blocks, timeout_s=deadline, task_name=name)
                return block

            return await pool.call(name, work)

        blocks = await asyncio.gather(*map(said, parts))
        found = tuple(zip(parts, blocks, strict=True))
        return Written(names=stage.writes, parts=found, beside=bool(stage.options.get("beside")))

    async def _credit(self, stage: Stage, table: RowTable, step: int) -> tuple[Written, dict[str, float]]:
        assert stage.call is not None
        if not stage.reads_tokens:
            return Written(values=by_episode(stage.call, table, **stage.options)), {}
        return await self._credit_of(stage, self.phase.pipeline.trained[0], table, step)

    async def _credit_of(
        self, stage: Stage, role: str, table: RowTable, step: int = -1
    ) -> tuple[Written, dict[str, float]]:
        """A credit call on the ranks of a role."""
        group, read = self._groups[role], table.only({"group", "learned", *stage.reads})
        whole, budget = bool(getattr(stage.call, "whole_groups", False)), self.phase.token_budget
        if whole and len(read):  # no model is called: what a micro-batch may hold is no limit
            _, member = np.unique(read["group"], return_inverse=True)
            budget = max(budget, int(np.bincount(member, weights=read.lengths).max()))
        shares = read.shard(len(group.workers), budget, keep_groups=whole)
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
        needed = _read(table, objective, stage)
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
        group = self._groups[stage.role]
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
            per_rank=await self._sent(shares),
            blocks=[share.blocks for share in shares],
            timeout_s=self._call_timeout_s[stage.role],
            task_name=_label(stage, step),
        )

    async def _mix(self, stage: Stage, table: RowTable, step: int) -> tuple[Written, dict[str, float]]:
        """Move a role's weights towards those of the source as this step leaves them, if it is such a step."""
        if (step + 1) % stage.options["every"] == 0:
            await mix_towards(
                self._groups[stage.options["source"]],
                self._groups[stage.role],
                stage.options["share"],
                timeout_s=max(self._call_timeout_s[role] for role in (stage.role, stage.options["source"])),
                task_name=_label(stage, step),
            )
        return NOTHING, {}

    async def _replay(self, stage: Stage, table: RowTable, step: int) -> tuple[Written, dict[str, float]]:
        assert self.replay_buffer is not None, "the phase was entered without this stage"
        max_age, scale = stage.options["max_age"], stage.options["scale"]
        other, metrics = replayed(
            table, self.replay_buffer, step=step, seed=self.phase.seed, max_age=max_age, scale=scale
        )
        return Written(instead=other), metrics

    async def _write(self, stage: Stage, table: RowTable, step: int) -> tuple[Written, dict[str, float]]:
        assert self.phase.output is not None, "a phase that writes has a place to write to"
        whole = table.only(stage.reads).whole()
        batch = whole.shard.fetched(await self.fetch(whole.blocks)).batch
        return NOTHING, await asyncio.to_thread(self.phase.output.write, stage, batch, step)

    def _group_of(self, stage: Stage) -> tuple[str, Group]:
        role = stage.role if stage.role in self._groups else self._stand_ins[stage.role]
        return role, self._groups[role]

    async def _sent(self, shares: Sequence[Share]) -> list[Shard | Ref]:
        """What each rank is called with: its shard, or a reference to it if it is large."""

        async def sent(shard: Shard) -> Shard | Ref:
            return shard if shard.nbytes() <= SMALL_SHARD_BYTES else await self._objects.put(shard)

        return list(await asyncio.gather(*(sent(share.shard) for share in shares)))

    async def _call_split(
        self, stage: Stage, role: str, group: Group, method: str, shares: Sequence[Share], *shared: Any, step: int
    ) -> list[tuple[Any, Ref]]:
        """A method that leaves a block with each rank's values in the object store."""
        return await group.call_split(
            method,
            *shared,
            per_rank=await self._sent(shares),
            blocks=[share.blocks for share in shares],
            timeout_s=self._call_timeout_s[role],
            task_name=_label(stage, step),
        )


def _over_minibatches(reports: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of what the minibatches report; seconds add up."""
    names = dict.fromkeys(name for report in reports for name in report)
    each = {name: [report[name] for report in reports if name in report] for name in names}
    return {name: float(np.sum(v) if name.startswith("time/") else np.mean(v)) for name, v in each.items()}


def _with_margins(metrics: dict[str, float]) -> dict[str, float]:
    """By how much what is chosen (or desirable) is rewarded above the rest. Losses over pairs report it themselves; of
    unpaired rows each micro-batch knows its own only, so it is made of the two sides' means over all of them."""
    chosen, rejected = metrics.get("rewards/chosen"), metrics.get("rewards/rejected")
    return metrics if chosen is None or rejected is None else {"rewards/margins": chosen - rejected, **metrics}


def _read(table: RowTable, objective: LossObjective, stage: Stage) -> RowTable:
    """The columns that a trainer needs of a batch."""
    missing = objective.columns - table.columns
    assert not missing, f"the pipeline was checked to write {sorted(missing)}"
    return table.only({"tokens", "mask", "group", "learned", *objective.columns, *stage.reads})


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
