"""The roles of a run, by name: run a stage on a batch, generate, score, publish. The only place where verbs become
calls.

collector ── generate, score ──► pools of rollout and reward workers
loop ─────── run(stage, batch) ─► groups of ranks (policy, reference, ...)
loop ─────── publish(version) ──► publisher: policy ──► every rollout worker
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.batch import Batch
from actors.columns import COLUMNS
from actors.errors import InfraFailure
from actors.packing import deal
from actors.worker import Group, Objects, Ref, Worker
from orchestrator.losses.objective import LossObjective
from orchestrator.pipeline import Pipeline, Stage, Verb
from orchestrator.pool import Pool
from orchestrator.publisher import Publisher, SyncReport
from orchestrator.transfer import mix_towards
from rewards.actor import ScoreResult
from rollout.sampling import GroupMeta, Request

FETCH_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class PhaseSettings:
    """What the stages of the current phase need to know besides their own options."""

    pipeline: Pipeline
    token_budget: int
    temperature: float  # log-probabilities are taken at the sampling temperature (1 where nothing is sampled)
    seed: int


class Roles:
    """Groups of ranks by role, the two pools, and the publisher between them. `call_timeouts_s`: of one verb of each
    group."""

    def __init__(
        self,
        groups: dict[str, Group],
        objects: Objects,
        *,
        rollout: Pool | None,
        reward: Pool | None,
        publisher: Publisher | None,
        call_timeouts_s: Mapping[str, float],
        implicit_reference: bool,
    ) -> None:
        self.groups, self.objects = groups, objects
        self.rollout, self.reward, self.publisher = rollout, reward, publisher
        self._call_timeouts_s, self._implicit_reference = call_timeouts_s, implicit_reference
        self._phase: PhaseSettings | None = None
        self._verbs: dict[Verb, Callable[[Stage, Batch, int], Awaitable[tuple[Batch, dict[str, float]]]]] = {
            Verb.LOGPS: self._logps,
            Verb.CREDIT: self._credit,
            Verb.UPDATE: self._update,
            Verb.MIX: self._mix,
        }

    def enter(self, phase: PhaseSettings) -> None:
        """Stages run with these settings from now on."""
        self._phase = phase

    @property
    def phase(self) -> PhaseSettings:
        assert self._phase is not None, "enter() a phase first"
        return self._phase

    def ranks(self, stage: Stage) -> int:
        """Processes that share the work of a stage."""
        return len(self.groups[self._holder(stage)[0]].workers)

    async def release(self, role: str) -> None:
        """End the processes of a role that no later stage needs, so that its memory is free."""
        await self.groups.pop(role).kill()

    async def run(self, stage: Stage, batch: Batch, step: int) -> tuple[Batch, dict[str, float]]:
        """One batch-wise stage: the batch with the columns that it writes, and its metrics."""
        return await self._verbs[stage.verb](stage, batch, step)

    async def evaluate(self, batch: Batch) -> dict[str, float]:
        """What the phase's updates would report of a batch, without learning from it: the stages before them run as in
        a step, and no weights change."""
        metrics: dict[str, float] = {}
        for stage in self.phase.pipeline:
            if stage.verb is Verb.UPDATE:
                objective = LossObjective.of(stage)
                found = await self._on_every_rank("evaluate", stage, _read(batch, objective), objective, step=-1)
                metrics |= _with_margins(found[0])
            elif stage.verb is not Verb.MIX:
                batch, _ = await self.run(stage, batch, step=-1)
        return metrics

    async def run_batch_stages(self, batch: Batch) -> Batch:
        """The batch-wise stages of the collecting part. Those that the policy's own processes carry out wait until they
        are neither updated nor published: queued behind each other there, the deadlines of both would run."""
        stages = self.phase.pipeline.batch_stages
        shared = any(self._holder(stage)[0] in self.phase.pipeline.trained for stage in stages)
        async with self.changing_weights() if shared else nullcontext():
            for stage in stages:
                batch, _ = await self.run(stage, batch, step=-1)
        return batch

    async def generate(self, request: Request) -> tuple[GroupMeta, Ref]:
        """Samples of one prompt, from whichever rollout worker is free."""
        pool = _required(self.rollout, "rollout")

        async def work(worker: Worker) -> tuple[GroupMeta, Ref]:
            try:
                name, deadline = f"rollout.generate {request.id}", pool.policy.call_timeout_s
                return await worker.call_split("generate", request, timeout_s=deadline, task_name=name)
            except asyncio.CancelledError:
                await _abort(worker, request.id)
                raise

        return await pool.call(request.id, work)

    async def score(self, prompt: Any, tokens: Ref) -> ScoreResult:
        """Rewards of one prompt's samples, from whichever reward worker is free."""
        pool = _required(self.reward, "reward")
        name, deadline = f"reward.score prompt {prompt.id}", pool.policy.call_timeout_s

        async def work(worker: Worker) -> ScoreResult:
            return await worker.call("score", tokens, prompt.prompt, prompt.columns, timeout_s=deadline, task_name=name)

        return await pool.call(f"score prompt {prompt.id}", work)

    async def fetch(self, refs: Sequence[Ref]) -> list[Batch]:
        return await asyncio.gather(*(self.objects.get(ref, timeout_s=FETCH_TIMEOUT_S) for ref in refs))

    @property
    def paused(self) -> bool:
        """Whether a pool has no workers because somebody wants none."""
        return any(pool is not None and pool.paused for pool in (self.rollout, self.reward))

    def changing_weights(self) -> AbstractAsyncContextManager[Any]:
        """Hold this while the policy is updated and published: no worker catches up with half-way weights meanwhile."""
        return nullcontext() if self.publisher is None else self.publisher.changing

    async def publish(self, version: int) -> SyncReport | None:
        """Bring the rollout workers to the policy's weights, unless they are there. The caller holds them still
        (`changing_weights`). None in a run without rollout workers, or if there was nothing to do."""
        if self.publisher is None or self.publisher.version == version:
            return None
        return await self.publisher.publish(version)

    async def _logps(self, stage: Stage, batch: Batch, step: int) -> tuple[Batch, dict[str, float]]:
        into = stage.options["into"]
        role, adapters = self._holder(stage)
        group = self.groups[role]
        needed = batch.only({"tokens", "mask", "group"} & set(batch.columns))
        dealt = deal(needed, len(group.workers), self.phase.token_budget)
        chunks = await asyncio.gather(*(self.objects.put(chunk) for _, chunk in dealt))
        results = await group.call(
            "logps",
            into,
            self.phase.temperature,
            adapters,
            per_rank=chunks,
            timeout_s=self._call_timeouts_s[role],
            task_name=_label(stage, step),
        )
        column = np.zeros(batch.num_tokens, COLUMNS[into].dtype)
        for (rows, _), values in zip(dealt, results, strict=True):
            column[batch.token_index(np.asarray(rows, np.int64))] = values[into]
        return batch.with_columns(**{into: column}), {}

    def _holder(self, stage: Stage) -> tuple[str, bool]:
        """Which group serves a stage: with adapters, the policy without them *is* the reference."""
        if stage.role == "reference" and self._implicit_reference:
            return "policy", False
        return stage.role, bool(stage.options.get("adapters", True))

    async def _credit(self, stage: Stage, batch: Batch, step: int) -> tuple[Batch, dict[str, float]]:
        assert stage.call is not None
        return batch.with_columns(**stage.call(batch, **stage.options)), {}

    async def _update(self, stage: Stage, batch: Batch, step: int) -> tuple[Batch, dict[str, float]]:
        """One optimizer step per minibatch and epoch; metrics are means over them."""
        objective = LossObjective.of(stage)
        needed = _read(batch, objective)
        reports = []
        for epoch in range(stage.options["epochs"]):
            for rows in _minibatches(needed, stage.options["minibatches"], (self.phase.seed, step, epoch)):
                part = needed.select(rows) if rows is not None else needed
                reports.append(await self._update_once(stage, part, objective, step))
        names = dict.fromkeys(name for report in reports for name in report)
        return batch, {name: float(np.mean([report[name] for report in reports if name in report])) for name in names}

    async def _update_once(self, stage: Stage, batch: Batch, objective: LossObjective, step: int) -> dict[str, float]:
        first = (await self._on_every_rank("update", stage, batch, objective, step))[0]
        seconds = {f"time/{name}": value for name, value in first.seconds.items()}
        return {
            **_with_margins(first.metrics),
            "grad_norm": first.grad_norm,
            "learning_rate": first.learning_rate,
            **seconds,
        }

    async def _on_every_rank(
        self, method: str, stage: Stage, batch: Batch, objective: LossObjective, step: int
    ) -> list[Any]:
        """`update` or `evaluate`: each rank has its share of the batch, and answers for all of it."""
        group = self.groups[stage.role]
        ranks, budget = len(group.workers), self.phase.token_budget
        dealt = deal(batch, ranks, budget, keep_groups=objective.keep_groups, aside=objective.aside)
        chunks = await asyncio.gather(*(self.objects.put(chunk) for _, chunk in dealt))
        return await group.call(
            method,
            objective,
            self.phase.temperature,
            stage.name,
            per_rank=chunks,
            timeout_s=self._call_timeouts_s[stage.role],
            task_name=_label(stage, step),
        )

    async def _mix(self, stage: Stage, batch: Batch, step: int) -> tuple[Batch, dict[str, float]]:
        """Move a role's weights towards those of the source as this step leaves them, if it is such a step."""
        if (step + 1) % stage.options["every"] == 0:
            await mix_towards(
                self.groups[stage.options["source"]],
                self.groups[stage.role],
                stage.options["share"],
                timeout_s=max(self._call_timeouts_s[stage.role], self._call_timeouts_s[stage.options["source"]]),
                task_name=_label(stage, step),
            )
        return batch, {}


def _with_margins(metrics: dict[str, float]) -> dict[str, float]:
    """By how much what is chosen (or desirable) is rewarded above the rest. Losses over pairs report it themselves; of
    unpaired rows each micro-batch knows its own only, so it is made of the two sides' means over all of them."""
    chosen, rejected = metrics.get("rewards/chosen"), metrics.get("rewards/rejected")
    return metrics if chosen is None or rejected is None else {"rewards/margins": chosen - rejected, **metrics}


def _read(batch: Batch, objective: LossObjective) -> Batch:
    """The columns that a trainer needs of a batch."""
    return batch.only({"tokens", "mask", "group", *objective.columns} & set(batch.columns) | set(objective.columns))


def _minibatches(batch: Batch, count: int, seed: tuple[int, int, int]) -> list[np.ndarray | None]:
    """Row indices of each minibatch: groups stay whole, dealt in an order that (seed, step, epoch) fixes."""
    if count == 1:
        return [None]
    groups = np.unique(batch["group"])
    shuffled = np.random.default_rng([value + 1 for value in seed]).permutation(groups)
    return [np.flatnonzero(np.isin(batch["group"], part)) for part in np.array_split(shuffled, count)]


def _label(stage: Stage, step: int) -> str:
    return f"{stage.name} step {step}" if step >= 0 else stage.name


def _required(pool: Pool | None, role: str) -> Pool:
    assert pool is not None, f"the plan launched no {role} workers"
    return pool


async def _abort(worker: Worker, request_id: str) -> None:
    """Tell a worker that nobody waits for a request any more; if it is gone, so is the request."""
    try:
        await asyncio.shield(worker.call("abort", [request_id], timeout_s=10.0))
    except InfraFailure:
        return
