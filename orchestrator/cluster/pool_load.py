"""How much is asked of a pool over time: what its autoscaler decides by, and what its status shows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LoadSeen:
    """What a pool was asked for in a stretch of time."""

    peak: int  # calls, carried and queued, at most
    busy: float  # share of what its workers could have worked on, averaged over the time: 0 to 1
    memory: float | None  # the fullest that its workers' key-value caches were, on average; None: they do not say


class PoolLoad:
    """Calls of one pool, from when they enter its queue to when they leave the pool. Used from one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.calls = 0  # carried and queued now
        self._places = 0  # calls that the workers which serve can work on at a time
        self._idle_since = self._began = self._at = clock()
        self._peak, self._worked = 0, 0.0
        self._memory: float | None = None

    @property
    def idle_s(self) -> float:
        """For how long there has been no call."""
        return 0.0 if self.calls else self._clock() - self._idle_since

    def rest(self) -> None:
        """It has not been idle until now: there was nobody who could have called."""
        self._idle_since = self._clock()

    def note(self, change: int, places: int) -> None:
        """There are so many calls more, and so many places from now on."""
        self._settle()
        self.calls, self._places = self.calls + change, places
        self._peak = max(self._peak, self.calls)
        if change and not self.calls:
            self._idle_since = self._at

    def fills(self, memory: float) -> None:
        """The share of their key-value caches that the workers use now, on average."""
        self._memory = memory if self._memory is None else max(self._memory, memory)

    def take(self) -> LoadSeen:
        """What was seen since the last `take`."""
        self._settle()
        seen = LoadSeen(self._peak, self._worked / max(self._at - self._began, 1e-9), self._memory)
        self._began, self._peak, self._worked, self._memory = self._at, self.calls, 0.0, None
        return seen

    def _settle(self) -> None:
        """Accounts for the time since the last change."""
        now = self._clock()
        share = min(1.0, self.calls / self._places) if self._places else float(self.calls > 0)
        self._worked += share * (now - self._at)
        self._at = now
