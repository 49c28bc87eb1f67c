"""Attempts of calls that may fail: a limit of calls at the same time, retries with pauses, and what follows if none
succeeds.

    run(attempt) ─► wait for a slot ─► attempt ─► its result
                          ▲               │ AttemptFailed
                          └── pause, ◄────┤
                              longer      └─ retries used up, or of no use ─► GaveUp ─► `instead`, as `on_failure` says:
                              each time         retry ─► InfraFailure or DataFailure, for the pool to decide
                                                drop, fail ─► Dropped, BudgetExhausted
                                                a number ─► that number for each sample

Waiting for a slot is no failure and counts towards no deadline; that of the worker's call ends it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from actors.batch import Array
from actors.errors import BudgetExhausted, DataFailure, Dropped, InfraFailure, RunError
from rewards.reward import AttemptFailed, FailureKind, Handling, OnFailure, pause_s

T = TypeVar("T")


@dataclass(frozen=True)
class CallStatistics:
    """How one call of a reward went: seconds of its last attempt, failed attempts by kind, and whether the constant of
    `on_failure` stands for its rewards (None: there is no such constant)."""

    seconds: float
    failures: Mapping[str, int]
    stood_in: bool | None = None


def call_statistics(
    seconds: float, failures: Mapping[str, int], on_failure: OnFailure, *, stood_in: bool
) -> CallStatistics:
    counts = {str(kind): count for kind, count in failures.items()}
    return CallStatistics(seconds, counts, None if isinstance(on_failure, str) else stood_in)


class GaveUp(Exception):
    """No attempt succeeded. `seconds`: how long the last one took."""

    def __init__(self, failed: AttemptFailed, attempts: int, seconds: float) -> None:
        super().__init__(str(failed) if attempts == 1 else f"{failed} (attempt {attempts} of {attempts})")
        self.failed, self.seconds = failed, seconds

    @property
    def kind(self) -> FailureKind:
        return self.failed.kind

    def for_the_pool(self) -> RunError:
        """As what the pool is told of it."""
        return InfraFailure(str(self)) if self.kind.is_infra else DataFailure(str(self))


class Attempts:
    """The calls of one reward on behalf of one worker. Used from one event loop."""

    def __init__(self, retries: int, concurrency: int | None, *, runs_on: bool = False) -> None:
        """`runs_on`: an attempt that has begun does not end because the call that waits for it is cancelled, as a
        function in a thread does not. Its deadline still applies, and it keeps its slot until it has ended."""
        self._attempts = 1 + retries
        self._slots = asyncio.Semaphore(concurrency) if concurrency else None
        self._runs_on = runs_on

    async def run(
        self,
        attempt: Callable[[], Awaitable[T]],
        failures: Counter[str],
        is_final: Callable[[AttemptFailed], bool] = lambda _: False,
    ) -> tuple[T, float]:
        """The first attempt's result that has one, and its seconds. `failures` counts the others by kind; `is_final`:
        those after which another attempt is of no use. Raises GaveUp."""
        for number in range(self._attempts):
            began = time.monotonic()
            try:
                if self._slots is not None:
                    await self._slots.acquire()
                began = time.monotonic()
                call = asyncio.ensure_future(attempt())
                call.add_done_callback(self._ended)
                result = await (asyncio.shield(call) if self._runs_on else call)
                return result, time.monotonic() - began
            except AttemptFailed as failed:
                failures[failed.kind] += 1
                if number + 1 == self._attempts or failed.kind is FailureKind.REFUSED or is_final(failed):
                    raise GaveUp(failed, number + 1, time.monotonic() - began) from None
                await asyncio.sleep(pause_s(number, failed.retry_after_s))
        raise AssertionError("the last attempt returns or raises")

    def _ended(self, call: asyncio.Future[Any]) -> None:
        error = None if call.cancelled() else call.exception()  # consumed: if it ran on, nobody waits for it
        goes_on = error.goes_on if isinstance(error, AttemptFailed) else None
        if goes_on is None:
            self._free_slot()
        else:
            goes_on.add_done_callback(self._free_slot)

    def _free_slot(self, _: object = None) -> None:
        if self._slots is not None:
            self._slots.release()


async def within(limit_s: float | None, call: Awaitable[T], name: str) -> T:
    """The result of an async call, which is cancelled at its deadline; then raises AttemptFailed."""
    try:
        async with asyncio.timeout(limit_s):
            return await call
    except TimeoutError:
        raise too_slow(name, limit_s) from None


def too_slow(name: str, limit_s: float | None, goes_on: asyncio.Future[Any] | None = None) -> AttemptFailed:
    return AttemptFailed(FailureKind.TIMEOUT, f"reward {name}: no answer within {limit_s:g} s", goes_on=goes_on)


def instead(name: str, handling: Handling, gave_up: GaveUp, count: int, error: RunError | None = None) -> Array:
    """[n] float32: what stands for the rewards of a call that failed for good, if a constant does. Raises what
    `on_failure` says; for `retry` that is `error`, or what the kind of the failure means to the pool."""
    policy = handling.on_failure
    if policy == "retry":
        raise error or gave_up.for_the_pool()
    if policy == "drop":
        raise Dropped(f"reward {name}: {gave_up.kind}", str(gave_up))
    if policy == "fail":
        raise BudgetExhausted(f"{gave_up}\nof the reward {name}, on_failure=fail ends the run")
    return np.full(count, policy, np.float32)
