"""The group-wise stages: what happens to a prompt and its samples before they join a batch.

generate ──► a pool of engines          score ──► a pool of scorers
take: the data's own completion          keep, regroup: in the driver, on the table of the group's rows
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from actors.batch import Array, Batch
from actors.errors import BudgetExhausted, DataFailure, Dropped, InfraFailure
from actors.worker import Objects, Ref, Worker
from orchestrator.cluster.failures import enough_survive
from orchestrator.cluster.pool import Pool
from orchestrator.collection.model_scorer import ModelScorer
from orchestrator.pipeline import ROW_SOURCES, Stage, Verb
from orchestrator.planning.prepared import ModelReward
from orchestrator.row_table import RowTable
from rewards.combine import weighted_sum
from rewards.worker import ScoreResult
from rollout.sampling import Finish, GroupMeta, Request, Sampling, sample_seed

DATA = "data"  # in the place of the worker that sampled a completion
PLACE = -1  # of the random numbers of a prompt group: those from 0 on are for its samples


@dataclass(frozen=True)
class PromptGroup:
    """A prompt on its way through the group stages. `seed` fixes its samples; `id` is unique in the run."""

    id: str
    position: int
    prompt: Any  # orchestrator.data.source.Prompt
    seed: int
    epoch: int = 0  # of the data
    admitted: float = field(default_factory=time.perf_counter)  # seconds on the driver's clock
    rows: RowTable = field(default_factory=lambda: RowTable(Batch.empty()))
    metas: tuple[GroupMeta, ...] = ()  # one per stage that brought rows
    own: tuple[bool, ...] = ()  # of each sample: whether a policy that is trained sampled it, alone
    passed: int = 0  # stages that bring rows, whether they ran for this group or not
    oldest_version: int | None = None  # of the tokens that changing weights have sampled; None: there are none
    score: ScoreResult | None = None  # of all samples, whichever became rows
    texts: Ref | None = None  # their `ScoredTexts`, which stay where they were scored
    ended: Mapping[Verb, float] = field(default_factory=dict[Verb, float])  # seconds on the driver's clock

    @property
    def place(self) -> float:
        """In [0, 1), uniform over positions: which of several stages run for this group (`Stage.share`)."""
        return sample_seed(self.seed, PLACE) / 2**63

    def with_rows(self, rows: RowTable, meta: GroupMeta, version: int | None, *, mixed: bool = False) -> PromptGroup:
        """What a stage brought, added. `version`: the oldest of its tokens, if they grow old; `mixed`: they are of two
        models."""
        versions = [each for each in (self.oldest_version, version) if each is not None]
        return replace(
            self,
            rows=RowTable.concat([self.rows, rows]),
            metas=(*self.metas, meta),
            own=(*self.own, *[version is not None and not mixed] * len(meta.lengths)),
            oldest_version=min(versions, default=None),
        )


class GroupStages:
    """Group-wise stages on the pools of engines and scorers, by role. `steady`: engine roles that follow a role whose
    weights do not change in the current phase. What they sample does not grow old."""

    def __init__(
        self,
        engines: Mapping[str, Pool],
        scorers: Mapping[str, Pool],
        models: Mapping[ModelReward, ModelScorer],
        objects: Objects,
    ) -> None:
        self.engines, self.scorers, self._models, self._objects = engines, scorers, models, objects
        self.steady: frozenset[str] = frozenset()
        self._verbs: dict[Verb, Callable[[Stage, PromptGroup, Sampling], Awaitable[PromptGroup | None]]] = {
            Verb.GENERATE: self._generate,
            Verb.TAKE: self._take,
            Verb.SCORE: self._score,
            Verb.KEEP: self._keep,
            Verb.REGROUP: self._regroup,
        }

    async def run(self, stage: Stage, group: PromptGroup, sampling: Sampling) -> PromptGroup | None:
        """The group as it is after the stage; None if another prompt is to take its place. Raises DataFailure if this
        prompt cannot be used, InfraFailure if the attempts are used up."""
        if stage.verb not in ROW_SOURCES:
            after = await self._verbs[stage.verb](stage, group, sampling)
        elif stage.covers(group.place):
            after = await self._verbs[stage.verb](stage, replace(group, passed=group.passed + 1), sampling)
        else:
            return replace(group, passed=group.passed + 1)
        return after and replace(after, ended={**after.ended, stage.verb: time.perf_counter()})

    async def sample(self, role: str, request: Request, sampler: int = 0) -> tuple[GroupMeta, RowTable]:
        """Samples of one prompt, from whichever worker of an engine role is free."""
        pool = self.engines[role]

        async def work(worker: Worker) -> tuple[GroupMeta, Ref]:
            try:
                name, deadline = f"{role}.generate {request.id}", pool.policy.call_timeout_s
                return await worker.call_split("generate", request, timeout_s=deadline, task_name=name)
            except asyncio.CancelledError:
                await _abort(worker, request.id)
                raise

        meta, block = await pool.call(request.id, work)
        return meta, _sampled_rows(request, meta, block, sampler)

    async def score(self, role: str, prompt: Any, rows: RowTable) -> tuple[ScoreResult, Ref]:
        """Rewards of one prompt's samples: functions, by whichever worker of a scorer role is free, and models. Beside
        them, where the texts that were scored are."""
        pool = self.scorers[role]
        name, deadline = f"{role}.score prompt {prompt.id}", pool.policy.call_timeout_s
        whole = rows.only({"tokens", "mask", "version"}).whole()

        async def work(worker: Worker) -> tuple[ScoreResult, Ref]:
            arguments = (whole.shard, prompt.prompt, prompt.columns, *whole.blocks)
            return await worker.call_split("score", *arguments, timeout_s=deadline, task_name=name)

        models = asyncio.gather(*(model.score(rows) for model in self._models.values()))
        (score, texts), said = await asyncio.gather(pool.call(f"score prompt {prompt.id}", work), models)
        return _with_models(score, dict(zip(self._models, said, strict=True))), texts

    async def _generate(self, stage: Stage, group: PromptGroup, sampling: Sampling) -> PromptGroup:
        sampler = group.passed - 1
        seed, name = group.seed, group.id
        if sampler:
            seed, name = sample_seed(seed, sampler), f"{name}/{sampler}"
        wanted = int(stage.options["n"])
        mixture = at_epoch(stage.options.get("mixture", (0.0,)), group.epoch)
        request = Request(name, group.prompt.tokens, wanted, sampling, seed, group=group.position, mixture=mixture)
        meta, rows = await self.sample(stage.role, request, sampler)
        if not enough_survive(len(meta.lengths), wanted):
            raise Dropped("too few samples survived", "; ".join(meta.failures))
        version = None if stage.role in self.steady else meta.oldest_version
        return group.with_rows(rows, meta, version, mixed=mixture > 0)

    async def _take(self, stage: Stage, group: PromptGroup, sampling: Sampling) -> PromptGroup:
        answer: Batch = group.prompt.answer
        tokens = answer.num_tokens
        unknown = {"sample_logps": np.where(answer["mask"], np.nan, 0.0), "version": np.full(tokens, -1)}
        block = await self._objects.put(answer.only({"tokens", "mask"}).with_columns(**unknown))
        request = Request(group.id, group.prompt.tokens, 1, sampling, group.seed, group=group.position)
        meta = GroupMeta(group.id, DATA, (tokens - len(request.prompt),), (Finish.STOP,), -1, -1, 0.0)
        return group.with_rows(_sampled_rows(request, meta, block, group.passed - 1), meta, None)

    async def _score(self, stage: Stage, group: PromptGroup, sampling: Sampling) -> PromptGroup:
        """For a group that cannot be scored: raises Dropped or BudgetExhausted if the reward's own `on_failure` says
        so, else as the role's says."""
        try:
            score, texts = await self.score(stage.role, group.prompt, group.rows)
        except Dropped:
            raise
        except (InfraFailure, DataFailure) as error:
            if not self.scorers[stage.role].policy.abort_on_failure:
                raise
            raise BudgetExhausted(
                f"prompt {group.prompt.id} could not be scored: {error}\nroles.{stage.role}.on_failure=abort ends the "
                "run for one; with drop the group is dropped, and counted"
            ) from error
        if np.isnan(score.total).all():
            raise Dropped("no opinion", f"no reward has an opinion on any sample: {_silent(score, group.prompt)}")
        columns = {"reward": score.total}
        if "reward_parts" in stage.writes:
            columns |= {"reward_parts": score.rewards, "reward_weights": np.tile(score.weights, (len(score.total), 1))}
        return replace(group, rows=group.rows.with_values(**columns), score=score, texts=texts)

    async def _keep(self, stage: Stage, group: PromptGroup, sampling: Sampling) -> PromptGroup | None:
        assert stage.call is not None
        return group if stage.call(group.rows["reward"], **stage.options) else None

    async def _regroup(self, stage: Stage, group: PromptGroup, sampling: Sampling) -> PromptGroup | None:
        assert stage.call is not None
        rows: RowTable | None = stage.call(group.rows, **stage.options["call"])
        return None if rows is None or not len(rows) else replace(group, rows=rows)


def at_epoch(values: Sequence[float], epoch: int) -> float:
    """Of one value per epoch of the data, the last of which holds for all later ones."""
    return float(values[min(epoch, len(values) - 1)])


def _sampled_rows(request: Request, meta: GroupMeta, block: Ref, sampler: int) -> RowTable:
    """What the driver knows of a finished group, beside where its tokens are."""
    count = len(meta.lengths)
    rows = Batch.build(
        np.asarray(meta.lengths, np.int64) + len(request.prompt),
        group=np.full(count, request.group, np.int64),
        truncated=[finish is Finish.LENGTH for finish in meta.finishes],
        sampler=np.full(count, sampler, np.int8),
        completion_tokens=np.asarray(meta.lengths, np.int32),
    )
    return RowTable.of_block(rows, block, {"tokens", "mask", "sample_logps", "version"})


def _with_models(score: ScoreResult, said: Mapping[ModelReward, Array]) -> ScoreResult:
    """The functions' result, extended by the scores of models."""
    if not said:
        return score
    columns = np.stack(list(said.values()), axis=1)
    weights = np.array([reward.weight for reward in said], np.float32)
    return replace(
        score,
        names=(*score.names, *(reward.label for reward in said)),
        rewards=np.concatenate([score.rewards, columns], axis=1),
        total=weighted_sum(np.column_stack([score.total, columns]), np.array([1.0, *weights])),
        weights=np.concatenate([score.weights, weights]),
    )


def _silent(score: ScoreResult, prompt: Any) -> str:
    names = ", ".join(score.names)
    return f"{names} returned None for each of the {len(score.total)} of prompt {prompt.id}; is the right column read?"


async def _abort(worker: Worker, request_id: str) -> None:
    """Cancel a request on its worker; if the worker is gone, so is the request."""
    try:
        await asyncio.shield(worker.call("abort", [request_id], timeout_s=10.0))
    except InfraFailure:
        return
