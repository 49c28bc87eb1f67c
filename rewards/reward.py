"""A reward that can be called, what is done around its calls, and how a call of it can fail."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 15.0  # before an attempt is repeated

OnFailure = Literal["retry", "drop", "fail"] | float


@dataclass(frozen=True)
class Handling:
    """What is done around the calls of one reward. `timeout_s` is the deadline of one attempt; None: only the worker's
    call as a whole has one. `concurrency` is of one worker; None: no limit of its own."""

    timeout_s: float | None = None
    retries: int = 0
    on_failure: OnFailure = "retry"
    concurrency: int | None = None

    def longest_s(self, calls: int) -> float:
        """Seconds after which `calls` calls that arrive together have all ended, queueing and pauses included; 0 where
        attempts have no deadline."""
        if self.timeout_s is None:
            return 0.0
        turns = math.ceil(calls / self.concurrency) if self.concurrency else 1
        # A call that repeats its attempt queues again, at worst behind all others.
        return turns * (1 + self.retries) * self.timeout_s + self.retries * LONGEST_PAUSE_S


class FailureKind(StrEnum):
    """Why an attempt gave no rewards."""

    TIMEOUT = "timeout"  # it passed its deadline
    UNREACHABLE = "unreachable"  # the machinery: no such process, no connection, a server that is down or overloaded
    RAISED = "raised"  # the function or the method raised an exception
    INVALID = "invalid"  # the answer is not one finite number or None for each completion
    REFUSED = "refused"  # the call is not understood, and would not be the next time

    @property
    def is_infra(self) -> bool:
        """Whether the machinery failed, and not the samples."""
        return self in (FailureKind.TIMEOUT, FailureKind.UNREACHABLE)


class AttemptFailed(Exception):
    """An attempt gave no rewards. `retry_after_s`: the server asked for a pause of that length. `goes_on`: what was
    tried, if it has not ended: a function in a thread cannot be stopped."""

    def __init__(
        self,
        kind: FailureKind,
        detail: str,
        retry_after_s: float = 0.0,
        goes_on: asyncio.Future[Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind, self.retry_after_s, self.goes_on = kind, retry_after_s, goes_on


@dataclass(frozen=True)
class Reward:
    """A reward ready to be called with keyword arguments. `parameters`: the names it takes, None if it takes any but
    those that it `ignores`. `close` ends its connections; it may be called from any thread."""

    name: str
    weight: float
    call: Callable[..., Any]
    parameters: frozenset[str] | None
    is_async: bool
    ignores: frozenset[str] = frozenset()
    handling: Handling = field(default_factory=Handling)
    close: Callable[[], None] = lambda: None

    def wants(self, name: str) -> bool:
        return name not in self.ignores and (self.parameters is None or name in self.parameters)


def pause_s(attempt: int, asked_for_s: float = 0.0) -> float:
    """Seconds before the attempt after number `attempt` (from 0): twice as long each time, and drawn at random from the
    upper half of that, so that calls that failed together are not repeated together."""
    longest = FIRST_PAUSE_S * 2.0 ** min(attempt, 16)
    return min(LONGEST_PAUSE_S, max(asked_for_s, random.uniform(longest / 2, longest)))
