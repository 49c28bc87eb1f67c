"""The group-wise stages: what happens to a prompt and its samples before they join a batch.

generate ──► a pool of engines; of engines and environments (`episodes`), if it is one of episodes
score ─────► a pool of scorers
take: the data's own completion          keep, regroup: in the driver, on the table of the group's rows
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from actors.batch import Batch
from actors.errors import BlockLost, BudgetExhausted, DataFailure, Dropped, InfraFailure
from actors.other_prompts import FILL, TEACHER_PROMPT
from actors.worker import Objects, Ref
from orchestrator.batches.row_table import RowTable
from orchestrator.batches.split_episodes import whole_episodes
from orchestrator.cluster.failures import enough_survive
from orchestrator.cluster.pool import Pool
from orchestrator.collection.episodes import REWARD, Episodes, rewards_of, rows_of
from orchestrator.collection.joined_requests import Requests
from orchestrator.collection.model_scorer import ModelScorer
from orchestrator.collection.samples import Samples, recorded, rows_of_samples
from orchestrator.collection.scoring import Given, Scored, Scoring, ToScore
from orchestrator.pipeline import ROW_SOURCES, Stage, Verb
from orchestrator.planning.prepared import ModelReward
from rewards.judge import JudgeSpec
from rewards.worker import ScoreResult
from rollout.sampling import EpisodeFacts, Finish, GroupMeta, Request, Sampling, sample_seed

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
    transcripts: tuple[Ref, ...] = ()  # of each sample, if the samples are episodes
    score: ScoreResult | None = None  # of all samples, whichever became rows
    texts: tuple[Ref, ...] = ()  # their `ScoredTexts`, which stay where they were scored
    ended: Mapping[Verb, float] = field(default_factory=dict[Verb, float])  # seconds on the driver's clock

    @property
    def place(self) -> float:
        """In [0, 1), uniform over positions: which of several stages run for this group (`Stage.share`)."""
        return sample_seed(self.seed, PLACE) / 2**63

    @property
    def episodes(self) -> tuple[EpisodeFacts, ...]:
        """Of each sample, if the samples are episodes."""
        return tuple(facts for meta in self.metas for facts in meta.episodes)

    def with_samples(self, samples: Samples, *, ages: bool, mixed: bool = False) -> PromptGroup:
        """What a stage brought, added. `ages`: its tokens grow old; `mixed`: they are of two models."""
        versions = [meta.oldest_version for meta in samples.metas] if ages else []
        if self.oldest_version is not None:
            versions.append(self.oldest_version)
        of_prompt = {name: np.full(len(samples.rows), value) for name, value in self.prompt.row_values.items()}
        number = len(self.own) + whole_episodes(samples.rows)[1]
        return replace(
            self,
            rows=RowTable.concat([self.rows, samples.rows.with_values(**of_prompt, sample=number)]),
            metas=(*self.metas, *samples.metas),
            transcripts=(*self.transcripts, *samples.transcripts),
            own=(*self.own, *[ages and not mixed] * samples.count),
            oldest_version=min(versions, default=None),
        )


class GroupStages:
    """Group-wise stages on the pools of engines and scorers, by role. `steady`: engine roles that follow a role whose
    weights do not change in the current phase. What they sample does not grow old."""

    def __init__(
        self,
        engines: Mapping[str, Pool],
        scorers: Mapping[str, Pool],
        models: Mapping[ModelReward, Sequence[ModelScorer]],
        objects: Objects,
        environments: Mapping[str, Pool] | None = None,
        judges: Sequence[JudgeSpec] = (),
    ) -> None:
        self.engines, self.scorers, self._objects = engines, scorers, objects
        self._requests = {role: Requests(pool) for role, pool in engines.items()}
        self.episodes = Episodes(engines, environments or {})
        self._scoring = Scoring(scorers, models, judges, self._answers)
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
        meta, block = await self._requests[role].sample(request)
        prompt = len(request.prompt)
        also = recorded(request.sampling)
        return meta, rows_of_samples(meta, block, group=request.group, sampler=sampler, prompt_tokens=prompt, also=also)

    async def sampled(
        self,
        stage: Stage,
        prompt: Any,
        name: str,
        sampling: Sampling,
        seed: int,
        group: int,
        sampler: int = 0,
        mixture: float = 0.0,
    ) -> Samples:
        """The samples of a `generate` stage, in one turn or as episodes."""
        wanted = int(stage.options["n"])
        request = Request(name, prompt.tokens, wanted, sampling, seed, group=group, mixture=mixture)
        if stage.episode is None:
            meta, rows = await self.sample(stage.role, request, sampler)
            return Samples(rows, (meta,), failures=meta.failures)
        played, failures = await self.episodes.played(stage.role, prompt, request)
        metas, transcripts = tuple(each.meta for each in played), tuple(each.transcript for each in played)
        return Samples(rows_of(played, group, sampler, recorded(sampling)), metas, transcripts, failures)

    async def score(self, role: str, asked: ToScore) -> Scored:
        """Rewards of one prompt's samples, and what the environment gave: see `Scoring.score`."""
        settings, given = self.episodes.settings, None
        if asked.episodes and settings is not None and settings.rewards:
            given = Given(REWARD, settings.reward_weight, rewards_of(asked.episodes))
        return await self._scoring.score(role, asked, given)

    async def _answers(self, role: str, request: Request) -> RowTable:
        return (await self.sample(role, request))[1]

    async def _generate(self, stage: Stage, group: PromptGroup, sampling: Sampling) -> PromptGroup:
        sampler = group.passed - 1
        seed, name = group.seed, group.id
        if sampler:
            seed, name = sample_seed(seed, sampler), f"{name}/{sampler}"
        mixture = at_epoch(stage.options.get("mixture", (0.0,)), group.epoch)
        samples = await self.sampled(stage, group.prompt, name, sampling, seed, group.position, sampler, mixture)
        if not enough_survive(samples.count, int(stage.options["n"])):
            raise Dropped("too few samples survived", "; ".join(samples.failures))
        samples = await self._with_teacher_prompt(samples, group.prompt)
        return group.with_samples(samples, ages=stage.role not in self.steady, mixed=mixture > 0)

    async def _with_teacher_prompt(self, samples: Samples, prompt: Any) -> Samples:
        """The samples with what their teacher reads in the place of the prompt, if the data says that."""
        if prompt.teacher_prompt is None:
            return samples
        rows = samples.rows
        column = np.tile(prompt.teacher_prompt, (len(rows), 1))
        block = await self._objects.put(Batch.build(rows.lengths, **{TEACHER_PROMPT: column}))
        tokens = int((prompt.teacher_prompt != FILL).sum())
        rows = rows.with_blocks({TEACHER_PROMPT}, [(np.arange(len(rows)), block)])
        return replace(samples, rows=rows.with_values(teacher_row_tokens=tokens + rows["completion_tokens"]))

    async def _take(self, stage: Stage, group: PromptGroup, sampling: Sampling) -> PromptGroup:
        answer: Batch = group.prompt.answer
        tokens = answer.num_tokens
        unknown = {"sample_logps": np.where(answer["mask"], np.nan, 0.0), "version": np.full(tokens, -1)}
        block = await self._objects.put(answer.only({"tokens", "mask"}).with_columns(**unknown))
        prompt = len(group.prompt.tokens)
        meta = GroupMeta(group.id, DATA, (tokens - prompt,), (Finish.STOP,), -1, -1, 0.0)
        rows = rows_of_samples(meta, block, group=group.position, sampler=group.passed - 1, prompt_tokens=prompt)
        samples = await self._with_teacher_prompt(Samples(rows, (meta,)), group.prompt)
        return group.with_samples(samples, ages=False)

    async def _score(self, stage: Stage, group: PromptGroup, sampling: Sampling) -> PromptGroup:
        """For a group that cannot be scored: raises Dropped or BudgetExhausted if the reward's own `on_failure` says
        so, else as the role's says."""
        try:
            episodes, member = whole_episodes(group.rows)
            asked = ToScore(group.id, group.seed, group.prompt, episodes, group.transcripts, group.episodes)
            scored = await self.score(stage.role, asked)
        except (Dropped, BlockLost):
            raise
        except (InfraFailure, DataFailure) as error:
            if not self.scorers[stage.role].policy.abort_on_failure:
                raise
            raise BudgetExhausted(
                f"prompt {group.prompt.id} could not be scored: {error}\nroles.{stage.role}.on_failure=abort ends the "
                "run for one; with drop the group is dropped, and counted"
            ) from error
        score, rows = scored.result, group.rows
        if np.isnan(score.total).all():
            raise Dropped("no opinion", f"no reward has an opinion on any sample: {_silent(score, group.prompt)}")
        columns = {"reward": score.total}
        if "reward_parts" in stage.writes:
            columns |= {"reward_parts": score.rewards, "reward_weights": np.tile(score.weights, (len(score.total), 1))}
        if "win_rate" in stage.writes:
            columns["win_rate"] = score.win_rates
        if "process_reward" in stage.writes:
            assert scored.steps is not None, "the plan refuses a phase that needs rewards of steps and has none"
            rows = scored.steps.added_to(rows)
        columns = {name: values[member] for name, values in columns.items()}
        return replace(group, rows=rows.with_values(**columns), score=score, texts=scored.texts)

    async def _keep(self, stage: Stage, group: PromptGroup, sampling: Sampling) -> PromptGroup | None:
        assert stage.call is not None
        return group if stage.call(whole_episodes(group.rows)[0]["reward"], **stage.options) else None

    async def _regroup(self, stage: Stage, group: PromptGroup, sampling: Sampling) -> PromptGroup | None:
        assert stage.call is not None
        rows: RowTable | None = stage.call(group.rows, **stage.options["call"])
        return None if rows is None or not len(rows) else replace(group, rows=rows)


def at_epoch(values: Sequence[float], epoch: int) -> float:
    """Of one value per epoch of the data, the last of which holds for all later ones."""
    return float(values[min(epoch, len(values) - 1)])


def _silent(score: ScoreResult, prompt: Any) -> str:
    names = ", ".join(score.names)
    return f"{names} returned None for each of the {len(score.total)} of prompt {prompt.id}; is the right column read?"
