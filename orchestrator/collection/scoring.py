"""The rewards of one prompt's samples, from whatever gives them, at the same time:

    functions, actors, endpoints   one call of a worker of the scorer role         ─┐
    the score of a role's model    `ModelScorer`, with the groups that wait, too    ├─► one `ScoreResult`
    (of an ensemble: of each)                                                       │
    a judge that is an engine      a scorer's worker writes the questions, engines ─┘
                                   answer them, the worker reads the answers

Each failure has its reward's name and is handled as that reward's `on_failure` says (`rewards/attempts.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from actors.batch import Array
from actors.errors import BudgetExhausted, DataFailure, Dropped, InfraFailure, NoAnswer, RunError
from actors.worker import Ref, Worker, all_or_first_error
from orchestrator.batches.row_table import RowTable, Share
from orchestrator.cluster.pool import Pool
from orchestrator.collection.joined_calls import JoinedCalls
from orchestrator.collection.model_scorer import ModelScorer
from orchestrator.planning.prepared import ModelReward
from rewards.attempts import CallStatistics, GaveUp, call_statistics, instead
from rewards.combine import of_ensemble, weighted_sum
from rewards.judge import JudgeSpec
from rewards.reward import AttemptFailed, FailureKind, Handling
from rewards.worker import Asked, Question, ScoreResult
from rollout.sampling import EpisodeFacts, Request, Sampling, sample_seed

Sample = Callable[[str, Request], Awaitable[RowTable]]
QUICK_S = 0.05
ENOUGH_S = 1.0  # of a call with several prompts, after which no further one is begun
NEWEST = 0.2  # weight of the newest call in the average
QUESTIONS = 1 << 20  # places of random numbers of a prompt group from here on are for the answers of judges


@dataclass(frozen=True)
class ToScore:
    """What is scored: a prompt and the table of its rows. `id` is unique among what is scored in the run; `seed` fixes
    what is drawn on the way. Of episodes: where each row's transcript is, and what the driver knows of it."""

    id: str
    seed: int
    prompt: Any  # orchestrator.data.source.Prompt
    rows: RowTable
    transcripts: tuple[Ref, ...] = ()
    episodes: Sequence[EpisodeFacts] = ()


@dataclass(frozen=True)
class Given:
    """A reward that came with the samples: `values` [n] float32, NaN for no opinion."""

    label: str
    weight: float
    values: Array


@dataclass(frozen=True)
class StepRewards:
    """What a process reward model gave the steps of each row: `rows` have the column `process_reward`. `others` [n]:
    the weighted sum of all other rewards, NaN where none has an opinion."""

    rows: RowTable
    weight: float
    others: Array

    def added_to(self, rows: RowTable) -> RowTable:
        weights = np.full(len(rows), self.weight, np.float32)
        table = rows.with_columns_of(self.rows, {"process_reward"})
        return table.with_values(process_weight=weights, outcome_reward=self.others)


@dataclass(frozen=True)
class Scored:
    """The rewards; where the texts that were scored are, and what was logged of them; and the rewards of single steps,
    if there are such."""

    result: ScoreResult
    texts: tuple[Ref, ...]
    steps: StepRewards | None = None


@dataclass(frozen=True)
class _Said(Given):
    """What a reward says when it is asked, and how its call went."""

    statistics: CallStatistics
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    texts: tuple[Ref, ...] = ()
    is_preference: bool = False
    steps: RowTable | None = None  # where each step has a reward of its own


class Scoring:
    """Used from one event loop. `sample`: draws answers from an engine role. `quick_s`: functions that take longer have
    a call of their own for each prompt."""

    def __init__(
        self,
        scorers: Mapping[str, Pool],
        models: Mapping[ModelReward, Sequence[ModelScorer]],
        judges: Sequence[JudgeSpec],
        sample: Sample,
        *,
        quick_s: float = QUICK_S,
    ) -> None:
        self._scorers, self._models, self._judges, self._sample = scorers, models, judges, sample
        self._quick_s = quick_s
        self._took: dict[str, float] = {}  # seconds of the functions of a scorer role, on average of late
        self._joined = {role: self._joined_calls(pool) for role, pool in scorers.items()}

    async def score(self, role: str, samples: ToScore, given: Given | None = None) -> Scored:
        """The rewards, functions by whichever worker of a scorer role is free, and the one that was `given`."""
        pool = self._scorers[role]
        work: list[Awaitable[Any]] = [
            self._call(pool, samples),
            *(self._model(reward, scorers, samples) for reward, scorers in self._models.items()),
            *(self._judge(judge, pool, samples) for judge in self._judges),
        ]
        (score, texts), *found = await all_or_first_error(work)
        result = _joined(score, found, given)
        return Scored(result, (texts, *(ref for one in found for ref in one.texts)), _of_steps(result, found))

    async def _call(self, pool: Pool, samples: ToScore) -> tuple[ScoreResult, Ref]:
        """Small work shares calls: what is known of it is how long the last functions took."""
        took = self._took.get(pool.role, np.inf)
        if took <= self._quick_s:
            result, texts = await self._joined[pool.role].ask(samples)
        else:
            result, texts = await self._on_worker(pool, samples, "score")
        seconds = max((call.seconds for call in result.calls), default=0.0)
        self._took[pool.role] = seconds if took == np.inf else took + (seconds - took) * NEWEST
        return result, texts

    def _joined_calls(self, pool: Pool) -> JoinedCalls[ToScore, tuple[ScoreResult, Ref]]:
        async def alone(samples: ToScore) -> tuple[ScoreResult, Ref]:
            return await self._on_worker(pool, samples, "score")

        async def together(
            worker: Worker, asked: Sequence[ToScore], name: str
        ) -> list[tuple[ScoreResult, Ref] | Exception]:
            shares = [(each, _scored(each.rows), _spoken(each)) for each in asked]
            items = [
                Asked(whole.shard, each.prompt.prompt, each.prompt.columns, len(whole.blocks) + len(spoken))
                for each, whole, spoken in shares
            ]
            blocks = [block for _, whole, spoken in shares for block in (*whole.blocks, *spoken)]
            limit, name = ENOUGH_S + pool.policy.call_timeout_s, f"{pool.role}.score prompt {name}"
            outcomes, *texts = await worker.call_split(
                "score_all", items, ENOUGH_S, *blocks, timeout_s=limit, task_name=name, refs=len(items)
            )
            pairs = zip(outcomes, texts, strict=True)
            return [outcome if isinstance(outcome, Exception) else (outcome, said) for outcome, said in pairs]

        return JoinedCalls(pool, lambda samples: samples.prompt.id, alone, together)

    async def _model(self, reward: ModelReward, scorers: Sequence[ModelScorer], samples: ToScore) -> _Said:
        steps: list[RowTable] = []

        async def score_of(role: str, scorer: ModelScorer) -> Array:
            table = await scorer.score(samples.rows)
            found = table["reward"]
            silent = np.isnan(found) if reward.steps is not None else False  # an answer without steps
            if not (np.isfinite(found) | silent).all():
                raise DataFailure(f"reward {reward.label}: the model of {role} gave {found.tolist()}")
            if "process_reward" in table:
                steps.append(table)
            return found

        async def scores() -> tuple[Array, Mapping[str, float], tuple[Ref, ...]]:
            asked = [score_of(role, scorer) for role, scorer in zip(reward.roles, scorers, strict=True)]
            members = np.stack(await all_or_first_error(asked), axis=1)
            if members.shape[1] == 1:
                return members[:, 0], {}, ()
            found, spread = of_ensemble(members, reward.combine, reward.deviations), members.std(axis=1)
            known = spread[~np.isnan(found)]
            metrics = {f"rewards/{reward.label}/ensemble_std": float(known.mean())} if len(known) else {}
            return found, metrics, ()

        handling = Handling(on_failure=reward.on_failure)
        said = await _handled(reward.label, reward.weight, handling, samples, scores)
        return replace(said, steps=steps[0] if steps else None)

    async def _judge(self, judge: JudgeSpec, pool: Pool, samples: ToScore) -> _Said:
        async def scores() -> tuple[Array, Mapping[str, float], tuple[Ref, ...]]:
            questions = await self._on_worker(pool, samples, "questions", judge.label)
            asked = (self._answers(judge, samples, number, each) for number, each in enumerate(questions))
            answers = await all_or_first_error(list(asked))
            blocks = [block for table in answers for block in table.blocks]
            (values, metrics), texts = await self._on_worker(pool, samples, "judged", judge.label, more=blocks)
            return values, metrics, (texts,)

        said = await _handled(judge.label, judge.weight, judge.handling, samples, scores)
        return replace(said, is_preference=judge.is_preference)

    async def _answers(self, judge: JudgeSpec, samples: ToScore, number: int, question: Question) -> RowTable:
        sampling = Sampling(question.max_tokens, question.temperature)
        seed = sample_seed(samples.seed, QUESTIONS + number)
        name = f"{samples.id}/{judge.label}/{number}"
        return await self._sample(question.role, Request(name, question.tokens, question.judgements, sampling, seed))

    async def _on_worker(
        self, pool: Pool, samples: ToScore, method: str, *first: str, more: Sequence[Ref] | None = None
    ) -> Any:
        """A method of whichever worker is free, with the samples, and more blocks if there are any."""
        whole, spoken = _scored(samples.rows), _spoken(samples)
        prompt = samples.prompt
        blocks = whole.blocks if more is None else (len(whole.blocks), *whole.blocks, *more)
        arguments = (*first, whole.shard, prompt.prompt, prompt.columns, *blocks, *spoken)
        name, limit = f"{pool.role}.{method} prompt {prompt.id}", pool.policy.call_timeout_s

        async def work(worker: Worker) -> Any:
            call = worker.call if method == "questions" else worker.call_split
            return await call(method, *arguments, timeout_s=limit, task_name=name)

        return await pool.call(f"{method} prompt {prompt.id}", work)


def _scored(rows: RowTable) -> Share:
    """What of rows their rewards read."""
    return rows.only({"tokens", "mask", "version"}).whole()


def _spoken(samples: ToScore) -> tuple[Ref, ...]:
    return samples.transcripts if samples.episodes else ()


async def _handled(
    label: str,
    weight: float,
    handling: Handling,
    samples: ToScore,
    scores: Callable[[], Awaitable[tuple[Array, Mapping[str, float], tuple[Ref, ...]]]],
) -> _Said:
    """One reward's call. For what it raises: what `on_failure` says, in the time that it took."""
    began, failures = time.monotonic(), Counter[str]()
    metrics: Mapping[str, float] = {}
    texts: tuple[Ref, ...] = ()
    stood_in = False
    try:
        values, metrics, texts = await scores()
    except (Dropped, BudgetExhausted):
        raise
    except (InfraFailure, DataFailure) as error:
        gave_up = GaveUp(AttemptFailed(_kind(error), str(error)), 1, time.monotonic() - began)
        values = instead(label, handling, gave_up, len(samples.rows), error)
        failures[gave_up.kind], stood_in = 1, True
    seconds = time.monotonic() - began
    statistics = call_statistics(seconds, failures, handling.on_failure, stood_in=stood_in)
    return _Said(label, weight, values, statistics, metrics, texts)


def _kind(error: RunError) -> FailureKind:
    if isinstance(error, NoAnswer):
        return FailureKind.TIMEOUT
    return FailureKind.UNREACHABLE if isinstance(error, InfraFailure) else FailureKind.INVALID


def _joined(score: ScoreResult, found: Sequence[_Said], given: Given | None) -> ScoreResult:
    """The functions' result, extended by that of the others."""
    others = [*found, *([given] if given else [])]
    if not others:
        return score
    columns = np.stack([one.values for one in others], axis=1)
    weights = np.array([one.weight for one in others], np.float32)
    return replace(
        score,
        names=(*score.names, *(one.label for one in others)),
        rewards=np.concatenate([score.rewards, columns], axis=1),
        total=weighted_sum(np.column_stack([score.total, columns]), np.array([1.0, *weights])),
        weights=np.concatenate([score.weights, weights]),
        preferring=score.preferring | {one.label for one in found if one.is_preference},
        calls=(*score.calls, *(one.statistics for one in found)),
        metrics={**score.metrics, **{name: value for one in found for name, value in one.metrics.items()}},
    )


def _of_steps(result: ScoreResult, found: Sequence[_Said]) -> StepRewards | None:
    """The configuration allows one reward of that kind."""
    said = next((one for one in found if one.steps is not None), None)
    if said is None or said.steps is None:
        return None
    others = [index for index, name in enumerate(result.names) if name != said.label]
    rest = weighted_sum(result.rewards[:, others], result.weights[others])
    return StepRewards(said.steps, said.weight, rest)
