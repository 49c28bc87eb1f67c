"""A reward worker: it turns finished samples into rewards. A plain class, an actor under Ray.

    pool ── score(tokens of one prompt) ──► decode ──┬─► sync functions, each in a thread ──┬──► [n, k] ──► total [n]
                                                     └─► async functions, on this loop ─────┘
    pool ── ping ──► a thread of its own: it answers while functions work, or hang

A function that raises, whatever it raises, is a `DataFailure` and never a reward; if it raises `InfraFailure`, the
samples are tried elsewhere. One that hangs is ended from outside: the pool's deadline kills this process, starts
another, and tries the samples again there. Up to `roles.reward.concurrency` calls of one function run at the same time;
a function that cannot bear that wants a concurrency of 1.
"""

from __future__ import annotations

import asyncio
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import actors
from actors.batch import Array, Batch
from actors.errors import DataFailure, InfraFailure
from actors.pretrained import load_tokenizer
from actors.sharding import Shard
from actors.worker import WorkerInfo
from rewards.combine import weighted_sum
from rewards.loading import Reward, RewardSpec

MAX_THREADS = 256  # calls of sync functions at the same time; the pool's own limit is the one that counts

Prompt = str | list[dict[str, Any]]
Conversation = list[dict[str, Any]]


@dataclass(frozen=True)
class ScoreResult:
    """Rewards of `n` samples under `k` functions. NaN: the function returned None, it had no opinion; in `total`: none
    had."""

    names: tuple[str, ...]  # [k]
    rewards: Array  # [n, k] float32
    total: Array  # [n] float32, weighted
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])  # logged by the functions themselves
    weights: Array = field(kw_only=True)  # [k] float32


@dataclass(frozen=True)
class ScoredTexts:
    """What was scored, and what the functions logged of each: for the table of completions, and long."""

    texts: tuple[str, ...]  # [n] completions as the functions saw them
    extra: Mapping[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])  # columns [n]


@dataclass(frozen=True)
class TrainerState:
    """What a reward may know about the training: the version of the weights that sampled, in optimizer steps."""

    global_step: int


class RewardWorker:
    """Scores the samples of one prompt at a time, several prompts at once. `tokenizer`: a folder or hub name."""

    def __init__(
        self, name: str, rewards: Sequence[RewardSpec], tokenizer: str, *, trust_remote_code: bool = False
    ) -> None:
        self.name = name
        self._specs, self._tokenizer_path, self._trust = tuple(rewards), tokenizer, trust_remote_code
        self._rewards: tuple[Reward, ...] = ()
        self._tokenizer: Any = None
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="reward")
        self._lock = threading.Lock()
        self._running: dict[int, float] = {}
        self._calls = 0

    def ready(self) -> WorkerInfo:
        """Load the functions and the tokenizer. Raises ConfigError."""
        self._rewards = tuple(spec.load() for spec in self._specs)
        self._tokenizer = load_tokenizer(self._tokenizer_path, self._trust)
        packages = str(Path(actors.__file__).parent)
        detail = {"rewards": [reward.name for reward in self._rewards]}
        return WorkerInfo(self.name, os.getpid(), platform.node(), packages, detail)

    def ping(self) -> dict[str, Any]:
        """How many calls run, and since when the oldest does (seconds)."""
        with self._lock:
            ages = [time.monotonic() - began for began in self._running.values()]
            return {"alive": True, "running": len(ages), "oldest_s": max(ages, default=0.0), "calls": self._calls}

    async def score(
        self, rows: Shard, prompt: Prompt, columns: Mapping[str, Any], *blocks: Batch
    ) -> tuple[ScoreResult, ScoredTexts]:
        """Rewards of `rows`, all samples of one `prompt`; `columns`: the prompt's other columns; `blocks`: those that
        the shard refers to.

        Raises DataFailure, with the function's name, if one raises or answers with something else than n rewards.
        """
        token = self._began()
        try:
            return await self._score(rows.fetched(blocks).batch, prompt, columns)
        finally:
            with self._lock:
                del self._running[token]

    async def _score(self, batch: Batch, prompt: Prompt, columns: Mapping[str, Any]) -> tuple[ScoreResult, ScoredTexts]:
        ids = _completion_ids(batch)
        texts = tuple(self._tokenizer.batch_decode(ids, skip_special_tokens=True))
        call = _Call(len(batch), prompt, columns, ids, texts, _trainer_state(batch))
        results = await asyncio.gather(*(call.run(reward, self._threads) for reward in self._rewards))
        rewards = np.zeros((len(batch), len(results)), np.float32)
        for column, (scores, _) in enumerate(results):
            rewards[:, column] = scores
        weights = np.array([reward.weight for reward in self._rewards], np.float32)
        total = weighted_sum(rewards, weights)
        if np.isinf(total).any():
            raise DataFailure(f"the weighted sum of the rewards {rewards[np.isinf(total)][0].tolist()} is infinite")
        names = tuple(reward.name for reward in self._rewards)
        logs = {name: log for name, (_, log) in zip(names, results, strict=True)}
        metrics = _merged({name: log.metrics for name, log in logs.items()})
        extra = _merged({name: log.extra for name, log in logs.items()})
        return ScoreResult(names, rewards, total, metrics, weights=weights), ScoredTexts(texts, extra)

    def _began(self) -> int:
        with self._lock:
            self._calls += 1
            self._running[self._calls] = time.monotonic()
            return self._calls


class Log:
    """What one function logs: a number for the run's metrics, a column beside the completions."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.metrics: dict[str, float] = {}
        self.extra: dict[str, tuple[Any, ...]] = {}

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        if len(values) != self._count:
            raise ValueError(f"log_extra({column!r}, ...) needs {self._count} values, got {len(values)}")
        self.extra[str(column)] = tuple(map(_plain, values))

    def log_metric(self, name: str, value: float) -> None:
        self.metrics[str(name)] = float(value)


def _plain(value: Any) -> Any:
    """A value that any process can read: the driver need not have the packages that a function uses."""
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if hasattr(value, "tolist"):  # arrays, tensors and their scalars
        return value.tolist()
    return str(value)


def _merged(logs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What all functions logged, in their order. A name that an earlier one used gets that of its function first."""
    merged: dict[str, Any] = {}
    for function, log in logs.items():
        merged |= {(f"{function}/{name}" if name in merged else name): value for name, value in log.items()}
    return merged


class _Call:
    """One round of functions on the samples of a prompt. Each is given copies of its own, and a log of its own: what
    one does to them reaches no other."""

    def __init__(
        self,
        count: int,
        prompt: Prompt,
        columns: Mapping[str, Any],
        ids: list[list[int]],
        texts: tuple[str, ...],
        state: TrainerState,
    ) -> None:
        self._count, self._state = count, state
        self._given: dict[str, Any] = {
            **{name: [value] * count for name, value in columns.items()},
            "prompts": [prompt] * count,
            "completions": _as_prompt(prompt, texts),
            "completion_ids": ids,
        }

    async def run(self, reward: Reward, threads: ThreadPoolExecutor) -> tuple[Array, Log]:
        """[n] float32 of one function, NaN for None; and what it logged. Raises DataFailure or InfraFailure."""
        log = Log(self._count)
        if not reward.is_async:
            work = partial(self._run_here, reward, log)
            return await asyncio.get_running_loop().run_in_executor(threads, work), log
        with _failures_of(reward.name):
            result = await reward.call(**self._arguments(reward, log))
            return _checked(result, self._count), log

    def _run_here(self, reward: Reward, log: Log) -> Array:
        """In a thread. What is raised must be caught in it: a future cannot carry every exception to the loop (a
        StopIteration would leave the loop waiting for ever, a SystemExit would end it)."""
        with _failures_of(reward.name):
            return _checked(reward.call(**self._arguments(reward, log)), self._count)

    def _arguments(self, reward: Reward, log: Log) -> dict[str, Any]:
        offered = {"trainer_state": self._state, "log_extra": log.log_extra, "log_metric": log.log_metric}
        copies = {name: list(map(deepcopy, rows)) for name, rows in self._given.items() if reward.wants(name)}
        return {**copies, **{name: value for name, value in offered.items() if reward.wants(name)}}


@contextmanager
def _failures_of(name: str) -> Iterator[None]:
    """Turns any exception of a reward into a failure with the reward's name, of a class that every process can
    unpickle."""
    try:
        yield
    except InfraFailure as error:
        raise InfraFailure(f"reward {name}: {error}") from None
    except DataFailure as error:
        raise DataFailure(f"reward {name}: {error}") from None
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except asyncio.CancelledError:
        if _is_cancelled():
            raise
        raise DataFailure(f"reward {name} raised CancelledError") from None
    except BaseException as error:  # SystemExit, too: a function does not end the process that others share
        raise DataFailure(f"reward {name} raised {type(error).__name__}: {error}") from None


def _is_cancelled() -> bool:
    """Whether it is the call that was cancelled, and not something inside the function."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # in a thread
        return False
    return task is not None and task.cancelling() > 0


def _completion_ids(batch: Batch) -> list[list[int]]:
    """The tokens that the policy wrote: those after the prompt, tool output left out."""
    return [batch.row("tokens", row)[batch.row("mask", row)].tolist() for row in range(len(batch))]


def _as_prompt(prompt: Prompt, texts: Sequence[str]) -> list[str] | list[Conversation]:
    """Completions in the prompt's form: text for text, a message for messages."""
    if isinstance(prompt, str):
        return list(texts)
    return [[{"role": "assistant", "content": text}] for text in texts]


def _trainer_state(batch: Batch) -> TrainerState:
    versions = batch["version"] if "version" in batch else np.zeros(0, np.int32)
    return TrainerState(int(versions.max()) if len(versions) else 0)


def _checked(result: Any, count: int) -> Array:
    """[n] float32. Raises DataFailure unless the result is a sequence of `count` finite numbers or Nones."""
    wanted = f"must return a list of {count} numbers or None"
    if isinstance(result, Mapping | Set | str | bytes):  # these iterate, too: over keys, in any order, over characters
        raise DataFailure(f"{wanted}, in the order of the completions; it returned a {type(result).__name__}")
    try:
        found = list(islice(result, count + 1))
        values = np.array([_number(value) for value in found], np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataFailure(f"{wanted}: {error}") from None
    if len(found) != count:
        raise DataFailure(f"returned {len(found) if len(found) < count else 'more'} rewards for {count} completions")
    nan = [row for row, value in enumerate(found) if value is not None and np.isnan(values[row])]
    if nan:
        raise DataFailure(f"returned NaN for completion {nan[0]}; None says that it has no opinion")
    if (np.abs(values) > np.finfo(np.float32).max).any():
        raise DataFailure("returned an infinite reward")
    return values.astype(np.float32)


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError(f"{value!r} is text")
    return np.nan if value is None else float(value)
