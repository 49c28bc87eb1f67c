"""A reward worker: it turns finished samples into rewards. A plain class, an actor under Ray.

    pool ── score(tokens of one prompt) ──► decode ──┬─► sync functions, each in a thread ──┬──► [n, k] ──► total [n]
                                                     └─► async functions, on this loop ─────┘
    pool ── ping ──► a thread of its own: it answers while functions work, or hang

Functions run here; named actors, HTTP endpoints and judges behind one are called from here, as async functions are
(`named_actor`, `http_endpoint`, `judge`); for a judge that is an engine role, questions are written and answers read
here (`engine_judge`). What is done around each call, and what follows if it gives no rewards: `caller`, `attempts`.

A function that raises, whatever it raises, is a `DataFailure` and never a reward; if it raises `InfraFailure`, the
samples are tried elsewhere. One that hangs is ended from outside: the pool's deadline, or a ping that says so, kills
this process; the pool starts another and tries the samples again there. Up to `roles.reward.concurrency` calls of one
function run at the same time, those that were given up and still run among them; a function that cannot bear that wants
a concurrency of 1.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import actors
from actors.batch import Array, Batch
from actors.errors import DataFailure, InfraFailure, RunError
from actors.pretrained import load_tokenizer
from actors.sharding import Shard
from actors.worker import WorkerInfo, all_or_first_error
from rewards.attempts import CallStatistics
from rewards.caller import RewardCaller
from rewards.calls import Prompt, Samples, TrainerState, merged
from rewards.combine import weighted_sum
from rewards.engine_judge import EngineJudges, Question
from rewards.judge import JudgeCaller, JudgeSpec
from rewards.specs import AnySpec, asks_engines

MAX_THREADS = 256  # calls of sync functions at the same time; the pool's own limit is the one that counts


class Spoken(Protocol):
    """The messages of an episode: those before the model's first turn, and those from it on."""

    @property
    def prompt(self) -> list[dict[str, Any]]: ...

    @property
    def messages(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class ScoreResult:
    """What `k` rewards say of `n` samples. NaN: the reward had no opinion; in `total`: none had."""

    names: tuple[str, ...]  # [k]
    rewards: Array  # [n, k] float32
    total: Array  # [n] float32, weighted
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])  # logged by the functions themselves
    calls: tuple[CallStatistics, ...] = ()  # of those first rewards that were asked
    weights: Array = field(kw_only=True)  # [k] float32
    preferring: frozenset[str] = frozenset()  # of the names, those whose rewards are win rates over siblings

    @property
    def win_rates(self) -> Array:
        """[n] float32: those of the one reward that has a weight, if it is of that kind; else NaN."""
        weighted = [index for index, weight in enumerate(self.weights) if weight]
        if len(weighted) == 1 and self.names[weighted[0]] in self.preferring:
            return self.rewards[:, weighted[0]]
        return np.full(len(self.total), np.nan, np.float32)


@dataclass(frozen=True)
class ScoredTexts:
    """The texts that were scored, with what the rewards logged of each. Large; only for the completions table."""

    texts: tuple[str, ...]  # [n] completions as the functions saw them
    extra: Mapping[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])  # columns [n]

    def with_extra(self, others: Sequence[ScoredTexts]) -> ScoredTexts:
        """The same, with what others logged of the same completions."""
        return replace(self, extra={name: values for one in (self, *others) for name, values in one.extra.items()})


@dataclass(frozen=True)
class Asked:
    """The samples of one prompt among those of a call: see `RewardWorker.score`. Of the call's blocks, taken in order,
    so many are its own."""

    rows: Shard
    prompt: Prompt
    columns: Mapping[str, Any]
    blocks: int


class RewardWorker:
    """Scores the samples of one prompt at a time, several prompts at once. `tokenizer`: a folder or hub name;
    `judge_tokenizers`: those of engine roles that judge."""

    def __init__(
        self,
        name: str,
        rewards: Sequence[AnySpec],
        tokenizer: str,
        *,
        judge_tokenizers: Mapping[str, str] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.name = name
        self._specs = [spec for spec in rewards if not asks_engines(spec)]
        self._engine_specs = [spec for spec in rewards if isinstance(spec, JudgeSpec) and spec.by_engine]
        self._tokenizer_path, self._trust = tokenizer, trust_remote_code
        self._judge_tokenizers = judge_tokenizers or {}
        self._engine_judges = EngineJudges((), {})
        self._callers: tuple[RewardCaller | JudgeCaller, ...] = ()
        self._tokenizer: Any = None
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="reward")
        self._lock = threading.Lock()
        self._running: dict[int, float] = {}
        self._calls = 0
        self._gave_up = False  # on a function in a thread that hangs

    def ready(self) -> WorkerInfo:
        """Load the functions and the tokenizer. Raises ConfigError."""
        self._callers = tuple(self._caller(spec) for spec in self._specs)
        self._tokenizer = load_tokenizer(self._tokenizer_path, self._trust)
        of_judges = {role: load_tokenizer(path, self._trust) for role, path in self._judge_tokenizers.items()}
        self._engine_judges = EngineJudges(self._engine_specs, of_judges)
        packages = str(Path(actors.__file__).parent)
        detail = {"rewards": [caller.name for caller in self._callers]}
        return WorkerInfo(self.name, os.getpid(), platform.node(), packages, detail)

    def ping(self) -> dict[str, Any]:
        """The number of running calls, the age of the oldest in seconds, and `alive`: False if a function hangs in this
        process although its call was given up."""
        hanging = [caller.name for caller in self._callers if caller.hanging]
        with self._lock:
            ages = [time.monotonic() - began for began in self._running.values()]
            health = {"running": len(ages), "oldest_s": max(ages, default=0.0), "calls": self._calls}
            if hanging and (self._gave_up or not self._running):  # else the answers of the others would be lost
                return {**health, "alive": False, "why": f"the reward {hanging[0]} hangs and cannot be stopped"}
            return {**health, "alive": True}

    async def score(
        self, rows: Shard, prompt: Prompt, columns: Mapping[str, Any], *blocks: Batch | Spoken
    ) -> tuple[ScoreResult, ScoredTexts]:
        """Rewards of `rows`, all samples of one `prompt`; `columns`: the prompt's other columns; `blocks`: those that
        the shard refers to, and of episodes what was said in each.

        Raises DataFailure, with the reward's name, if one raises or answers with something else than n rewards;
        InfraFailure if one cannot be reached or passes its deadline; BudgetExhausted if that is to end the run.
        """
        batches, spoken = _apart(blocks)
        with self._one_call():
            return await self._score(rows.fetched(batches).batch, prompt, columns, spoken)

    async def score_all(
        self, asked: Sequence[Asked], enough_s: float, *blocks: Batch | Spoken
    ) -> tuple[list[ScoreResult | RunError], *tuple[ScoredTexts, ...]]:
        """`score` of several prompts, one after the other, so that no more calls of a function run at the same time
        than calls of the worker: what each gives, or with no texts the error that it raised. After `enough_s` no
        further prompt is begun: those have an InfraFailure, so that they do not wait for one that is slow."""
        outcomes: list[ScoreResult | RunError] = []
        texts: list[ScoredTexts] = []
        first, began = 0, time.monotonic()
        for number, each in enumerate(asked):
            own, first = blocks[first : first + each.blocks], first + each.blocks
            try:
                if number and time.monotonic() - began >= enough_s:
                    raise InfraFailure(f"{self.name}: other prompts of the call took {enough_s:g} s; ask again")
                outcome, said = await self.score(each.rows, each.prompt, each.columns, *own)
            except RunError as error:
                outcome, said = error, ScoredTexts(())
            outcomes.append(outcome)
            texts.append(said)
        return outcomes, *texts

    async def questions(
        self, judge: str, rows: Shard, prompt: Prompt, columns: Mapping[str, Any], *blocks: Any
    ) -> list[Question]:
        """What the engines of a judge are asked about `rows`, which are as in `score`."""
        batches, spoken = _apart(blocks)
        with self._one_call():
            samples = self._samples(rows.fetched(batches).batch, prompt, columns, spoken)
            return await asyncio.to_thread(self._engine_judges.questions, judge, samples)

    async def judged(
        self, judge: str, rows: Shard, prompt: Prompt, columns: Mapping[str, Any], held: int, *blocks: Any
    ) -> tuple[tuple[Array, dict[str, float]], ScoredTexts]:
        """([n] float32 rewards of a judge, NaN for no opinion; its metrics), and what it said. `held`: so many batches
        are those of the rows; the others are the answers to each of `questions`."""
        batches, spoken = _apart(blocks)
        with self._one_call():
            samples = self._samples(rows.fetched(batches[:held]).batch, prompt, columns, spoken)
            values, log = await asyncio.to_thread(self._engine_judges.judged, judge, samples, batches[held:])
            return (values, log.metrics), ScoredTexts((), log.extra)

    @contextmanager
    def _one_call(self) -> Iterator[None]:
        token = self._began()
        try:
            yield
        finally:
            with self._lock:
                # Not earlier: a process that is not `alive` is killed, and the answer of this call would be lost.
                self._gave_up |= any(caller.hanging for caller in self._callers)
                del self._running[token]

    def _samples(self, batch: Batch, prompt: Prompt, columns: Mapping[str, Any], spoken: Sequence[Spoken]) -> Samples:
        ids, count = _completion_ids(batch), len(batch)
        beside = {name: [value] * count for name, value in columns.items()}
        if spoken:
            texts = tuple(turns(each.messages) for each in spoken)
            prompts, conversations = [each.prompt for each in spoken], [each.messages for each in spoken]
            return Samples(prompts, texts, ids, beside, _trainer_state(batch), conversations)
        texts = tuple(self._tokenizer.batch_decode(ids, skip_special_tokens=True))
        return Samples([prompt] * count, texts, ids, beside, _trainer_state(batch))

    async def _score(
        self, batch: Batch, prompt: Prompt, columns: Mapping[str, Any], spoken: Sequence[Spoken]
    ) -> tuple[ScoreResult, ScoredTexts]:
        samples = self._samples(batch, prompt, columns, spoken)
        count = len(samples)
        scored = await all_or_first_error([caller.score(samples) for caller in self._callers])
        rewards = np.stack([each.values for each in scored], axis=1) if scored else np.zeros((count, 0), np.float32)
        weights = np.array([caller.weight for caller in self._callers], np.float32)
        total = weighted_sum(rewards, weights)
        if np.isinf(total).any():
            raise DataFailure(f"the weighted sum of the rewards {rewards[np.isinf(total)][0].tolist()} is infinite")
        names = tuple(caller.name for caller in self._callers)
        logs = {name: each.log for name, each in zip(names, scored, strict=True)}
        metrics = merged({name: log.metrics for name, log in logs.items()})
        extra = merged({name: log.extra for name, log in logs.items()})
        extra |= {"messages": tuple(each.messages for each in spoken)} if spoken else {}
        calls = tuple(each.statistics for each in scored)
        preferring = frozenset(caller.name for caller in self._callers if caller.is_preference)
        result = ScoreResult(names, rewards, total, metrics, calls, weights=weights, preferring=preferring)
        return result, ScoredTexts(samples.texts, extra)

    def close(self) -> None:
        """End connections. From a thread, while the loop that calls went through still runs."""
        for caller in self._callers:
            caller.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _caller(self, spec: AnySpec) -> RewardCaller | JudgeCaller:
        return JudgeCaller(spec) if isinstance(spec, JudgeSpec) else RewardCaller(spec.load(), self._threads)

    def _began(self) -> int:
        with self._lock:
            self._calls += 1
            self._running[self._calls] = time.monotonic()
            return self._calls


def _apart(blocks: Sequence[Any]) -> tuple[list[Batch], list[Spoken]]:
    """Splits blocks into batches of rows and the messages of episodes."""
    batches = [block for block in blocks if isinstance(block, Batch)]
    return batches, [block for block in blocks if not isinstance(block, Batch)]


def _completion_ids(batch: Batch) -> list[list[int]]:
    """The tokens that the policy wrote: those after the prompt, tool output left out."""
    return [batch.row("tokens", row)[batch.row("mask", row)].tolist() for row in range(len(batch))]


def turns(messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as a text, one message a line, calls of tools included."""
    return "\n".join(f"{message['role']}: {_said(message)}" for message in messages)


def _said(message: Mapping[str, Any]) -> str:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    called = [f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls]
    broken = [str(call["arguments"]) for call in message.get("invalid_tool_calls") or ()]
    return " ".join(part for part in (str(message["content"]), *called, *broken) if part)


def _trainer_state(batch: Batch) -> TrainerState:
    versions = batch["version"] if "version" in batch else np.zeros(0, np.int32)
    return TrainerState(int(versions.max()) if len(versions) else 0)
