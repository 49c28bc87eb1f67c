"""One reward, called on behalf of one worker: attempts with a deadline, and what stands for its rewards if all fail
(`attempts`).

An async call is cancelled at its deadline. A function in a thread cannot be stopped: it `hangs`, is not tried again
beside itself, and its process has to be replaced. The same applies to a function whose call is cancelled. Until it
ends it keeps its place among the `concurrency` calls, so that one that is not thread-safe does not run beside itself.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from actors.batch import Array
from actors.errors import NoAnswer
from rewards.attempts import Attempts, CallStatistics, GaveUp, call_statistics, instead, too_slow, within
from rewards.calls import Log, Samples
from rewards.reward import AttemptFailed, FailureKind, Reward


@dataclass(frozen=True)
class Scored:
    """`values`: [n] float32, NaN for None."""

    values: Array
    log: Log
    statistics: CallStatistics


class RewardCaller:
    """Calls one reward. Used from one event loop; sync functions run in `threads`."""

    is_preference = False

    def __init__(self, reward: Reward, threads: ThreadPoolExecutor) -> None:
        self.reward, self.name, self.weight = reward, reward.name, reward.weight
        self.hanging = 0  # calls of a sync function that passed their deadline and still run
        self._threads = threads
        self._attempts = Attempts(reward.handling.retries, reward.handling.concurrency, runs_on=not reward.is_async)

    async def score(self, samples: Samples) -> Scored:
        """Raises InfraFailure, DataFailure or BudgetExhausted with the reward's name, as `on_failure` says."""
        failures, handling = Counter[str](), self.reward.handling
        try:
            (values, log), seconds = await self._attempts.run(lambda: self._attempt(samples), failures, self._hangs)
            stood_in = False
        except GaveUp as error:
            hangs = NoAnswer(str(error)) if self._hangs(error.failed) else None  # for which the pool kills this process
            values = instead(self.reward.name, handling, error, len(samples), hangs)
            log, seconds, stood_in = Log(len(samples)), error.seconds, True
        return Scored(values, log, call_statistics(seconds, failures, handling.on_failure, stood_in=stood_in))

    def close(self) -> None:
        """End the reward's connections. From a thread, while the loop that calls went through still runs."""
        self.reward.close()

    async def _attempt(self, samples: Samples) -> tuple[Array, Log]:
        limit = self.reward.handling.timeout_s
        if self.reward.is_async:
            return await within(limit, samples.awaited(self.reward), self.reward.name)
        call = asyncio.get_running_loop().run_in_executor(self._threads, samples.called, self.reward)
        await asyncio.wait({call}, timeout=limit)
        if not call.done():
            self.hanging += 1
            call.add_done_callback(self._ended)
            raise too_slow(self.reward.name, limit, goes_on=call)
        return call.result()

    def _hangs(self, failed: AttemptFailed) -> bool:
        return failed.kind is FailureKind.TIMEOUT and not self.reward.is_async

    def _ended(self, call: asyncio.Future[tuple[Array, Log]]) -> None:
        """A call that was given up has ended after all."""
        self.hanging -= 1
        if not call.cancelled():
            call.exception()  # consumed: nobody waits for it
