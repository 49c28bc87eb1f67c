"""A reward worker: it turns finished samples into rewards. A plain class, an actor under Ray.

    pool ── score(tokens of one prompt) ──► decode ──┬─► sync functions, each in a thread ──┬──► [n, k] ──► total [n]
                                                     └─► async functions, on this loop ─────┘
    pool ── ping ──► a thread of its own: it answers while functions work, or hang

A function that raises is a `DataFailure`, never a reward (unless it raises `InfraFailure`: then the samples are tried
elsewhere). One that hangs is ended from outside: the pool's deadline kills this process, starts another, and tries the
samples again there. Up to `roles.reward.concurrency` calls of one function run at the same time; a function that cannot
bear that wants a concurrency of 1.
"""

from __future__ import annotations

import asyncio
import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import actors
from actors.batch import Array, Batch
from actors.errors import DataFailure, InfraFailure
from actors.pretrained import load_tokenizer
from actors.worker import WorkerInfo
from rewards.combine import weighted_sum
from rewards.loading import Reward, RewardSpec

MAX_THREADS = 256  # calls of sync functions at the same time; the pool's own limit is the one that counts

Prompt = str | list[dict[str, Any]]
Conversation = list[dict[str, Any]]


@dataclass(frozen=True)
class ScoreResult:
    """Rewards of `n` samples under `k` functions. NaN: the function had no opinion; in `total`: none had."""

    names: tuple[str, ...]  # [k]
    rewards: Array  # [n, k] float32
    total: Array  # [n] float32, weighted
    texts: tuple[str, ...]  # [n] completions as the functions saw them
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])  # logged by the functions themselves
    extra: Mapping[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])  # likewise, columns [n]


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

    async def score(self, batch: Batch, prompt: Prompt, columns: Mapping[str, Any]) -> ScoreResult:
        """Rewards of the rows of `batch`, all samples of one `prompt`; `columns`: the prompt's other columns.

        Raises DataFailure, with the function's name, if one raises or answers with something else than n rewards.
        """
        token = self._began()
        try:
            return await self._score(batch, prompt, columns)
        finally:
            with self._lock:
                del self._running[token]

    async def _score(self, batch: Batch, prompt: Prompt, columns: Mapping[str, Any]) -> ScoreResult:
        ids = _completion_ids(batch)
        texts = tuple(self._tokenizer.batch_decode(ids, skip_special_tokens=True))
        call = _Call(len(batch), prompt, columns, ids, texts, _trainer_state(batch))
        scores = await asyncio.gather(*(call.run(reward, self._threads) for reward in self._rewards))
        rewards = np.stack(scores, axis=1) if scores else np.zeros((len(batch), 0), np.float32)
        weights = np.array([reward.weight for reward in self._rewards], np.float32)
        names = tuple(reward.name for reward in self._rewards)
        return ScoreResult(names, rewards, weighted_sum(rewards, weights), texts, call.metrics, call.extra)

    def _began(self) -> int:
        with self._lock:
            self._calls += 1
            self._running[self._calls] = time.monotonic()
            return self._calls


class _Call:
    """The arguments of one round of functions, and what they log."""

    def __init__(
        self,
        count: int,
        prompt: Prompt,
        columns: Mapping[str, Any],
        ids: list[list[int]],
        texts: tuple[str, ...],
        state: TrainerState,
    ) -> None:
        self.metrics: dict[str, float] = {}
        self.extra: dict[str, tuple[Any, ...]] = {}
        self._count = count
        self._given: dict[str, Any] = {
            **{name: [value] * count for name, value in columns.items()},
            "prompts": [prompt] * count,
            "completions": _as_prompt(prompt, texts),
            "completion_ids": ids,
            "trainer_state": state,
            "log_extra": self._log_extra,
            "log_metric": self._log_metric,
        }

    async def run(self, reward: Reward, threads: ThreadPoolExecutor) -> Array:
        """[n] float32 of one function; NaN for None."""
        given = {name: value for name, value in self._given.items() if reward.wants(name)}
        try:
            if reward.is_async:
                result = await reward.call(**given)
            else:
                result = await asyncio.get_running_loop().run_in_executor(threads, partial(reward.call, **given))
        except (DataFailure, InfraFailure):
            raise
        except Exception as error:
            raise DataFailure(f"reward {reward.name} raised {type(error).__name__}: {error}") from None
        return _checked(result, self._count, reward.name)

    def _log_extra(self, column: str, values: Sequence[Any]) -> None:
        if len(values) != self._count:
            raise ValueError(f"log_extra({column!r}, ...) needs {self._count} values, got {len(values)}")
        self.extra[column] = tuple(values)

    def _log_metric(self, name: str, value: float) -> None:
        self.metrics[name] = float(value)


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


def _checked(result: Any, count: int, name: str) -> Array:
    """Raises DataFailure unless the result is `count` finite numbers or Nones."""
    try:
        values = np.array([np.nan if value is None else float(value) for value in result], np.float32)
    except (TypeError, ValueError) as error:
        raise DataFailure(f"reward {name} must return a list of {count} numbers or None: {error}") from None
    if len(values) != count:
        raise DataFailure(f"reward {name} returned {len(values)} rewards for {count} completions")
    if np.isinf(values).any():
        raise DataFailure(f"reward {name} returned an infinite reward")
    return values
