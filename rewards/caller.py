"""One reward and its attempts: deadline, retries, limit of calls at the same time, and what follows if none succeeds.

    score(samples) ─► wait for a slot ─► attempt, with a deadline ─► [n] rewards
                            ▲                      │ AttemptFailed
                            └── pause, longer ◄────┤
                                each time          └─ retries used up, or of no use ─► `on_failure`:
                                                      retry ─► InfraFailure or DataFailure, for the pool to decide
                                                      drop, fail ─► Dropped, BudgetExhausted
                                                      a number ─► that number for each sample

Waiting for a slot is no failure and counts towards no deadline. An async call is cancelled at its deadline. A function
in a thread cannot be stopped: it `hangs`, is not tried again beside itself, and its process has to be replaced.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from actors.batch import Array
from actors.errors import BudgetExhausted, DataFailure, Dropped, InfraFailure, NoAnswer, RunError
from rewards.calls import Log, Samples
from rewards.reward import AttemptFailed, FailureKind, Reward, pause_s


@dataclass(frozen=True)
class CallStatistics:
    """How one call of a reward went: seconds of its last attempt, failed attempts by kind, and whether the constant of
    `on_failure` stands for its rewards (None: there is no such constant)."""

    seconds: float
    failures: Mapping[str, int]
    stood_in: bool | None = None


@dataclass(frozen=True)
class Scored:
    """`values`: [n] float32, NaN for None."""

    values: Array
    log: Log
    statistics: CallStatistics


class RewardCaller:
    """Calls one reward on behalf of one worker. Used from one event loop; sync functions run in `threads`."""

    def __init__(self, reward: Reward, threads: ThreadPoolExecutor) -> None:
        self.reward = reward
        self.hanging = 0  # calls of a sync function that passed their deadline and still run
        self._threads = threads
        limit = reward.handling.concurrency
        self._slots = asyncio.Semaphore(limit) if limit else nullcontext()

    async def score(self, samples: Samples) -> Scored:
        """Raises InfraFailure, DataFailure or BudgetExhausted with the reward's name, as `on_failure` says."""
        failures = Counter[str]()
        attempts = 1 + self.reward.handling.retries
        for attempt in range(attempts):
            began = time.monotonic()
            try:
                async with self._slots:
                    began = time.monotonic()
                    values, log = await self._attempt(samples)
                return Scored(values, log, self._statistics(began, failures, False))
            except AttemptFailed as failed:
                failures[failed.kind] += 1
                last = attempt + 1 == attempts or failed.kind is FailureKind.REFUSED or self._hangs(failed)
                if last:
                    values = self._instead(failed, len(samples), attempt + 1)
                    return Scored(values, Log(len(samples)), self._statistics(began, failures, True))
                await asyncio.sleep(pause_s(attempt, failed.retry_after_s))
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, samples: Samples) -> tuple[Array, Log]:
        limit = self.reward.handling.timeout_s
        if self.reward.is_async:
            try:
                async with asyncio.timeout(limit):
                    return await samples.awaited(self.reward)
            except TimeoutError:
                raise self._too_slow() from None
        call = asyncio.get_running_loop().run_in_executor(self._threads, samples.called, self.reward)
        await asyncio.wait({call}, timeout=limit)
        if not call.done():
            self.hanging += 1
            call.add_done_callback(self._ended)
            raise self._too_slow()
        return call.result()

    def _too_slow(self) -> AttemptFailed:
        limit = self.reward.handling.timeout_s
        return AttemptFailed(FailureKind.TIMEOUT, f"reward {self.reward.name}: no answer within {limit:g} s")

    def _hangs(self, failed: AttemptFailed) -> bool:
        return failed.kind is FailureKind.TIMEOUT and not self.reward.is_async

    def _ended(self, call: asyncio.Future[tuple[Array, Log]]) -> None:
        """A call that was given up has ended after all."""
        self.hanging -= 1
        if not call.cancelled():
            call.exception()  # consumed: nobody waits for it

    def _instead(self, failed: AttemptFailed, count: int, attempts: int) -> Array:
        """What stands for the rewards of a call that failed for good, if a constant does."""
        policy, name = self.reward.handling.on_failure, self.reward.name
        why = str(failed) if attempts == 1 else f"{failed} (attempt {attempts} of {attempts})"
        if policy == "retry":
            raise self._for_the_pool(failed, why)
        if policy == "drop":
            raise Dropped(f"reward {name}: {failed.kind}", why)
        if policy == "fail":
            raise BudgetExhausted(f"{why}\nof the reward {name}, on_failure=fail ends the run")
        return np.full(count, policy, np.float32)

    def _for_the_pool(self, failed: AttemptFailed, why: str) -> RunError:
        if self._hangs(failed):
            return NoAnswer(why)  # for which the pool kills this process
        return InfraFailure(why) if failed.kind.is_infra else DataFailure(why)

    def _statistics(self, began: float, failures: Mapping[str, int], stood_in: bool) -> CallStatistics:
        has_constant = not isinstance(self.reward.handling.on_failure, str)
        seconds = time.monotonic() - began
        return CallStatistics(
            seconds, {str(kind): n for kind, n in failures.items()}, stood_in if has_constant else None
        )
