"""What a failure means, how many of them a run bears, and who waits on what. Pure; the clock is an argument."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from actors.errors import BudgetExhausted, DataFailure, InfraFailure

SURVIVORS = 0.75  # of a prompt's samples, for its group to train
FIRST_FAILURES = 8  # groups for which the machinery failed, in a run in which it never worked: it never will


class Kind(StrEnum):
    INFRA = "infra"  # the machinery: try elsewhere
    DATA = "data"  # the sample: drop it
    BUG = "bug"  # neither: end the run


def classify(error: BaseException) -> Kind:
    """What an exception that reached the driver stands for."""
    if isinstance(error, InfraFailure):
        return Kind.INFRA
    return Kind.DATA if isinstance(error, DataFailure) else Kind.BUG


def enough_survive(survivors: int, wanted: int) -> bool:
    """Whether a prompt group with that many finished samples may train."""
    return survivors >= math.ceil(SURVIVORS * wanted)


@dataclass
class Ledger:
    """Dropped groups, by reason. More than `allowed_in_a_row` end the run: a data set or a reward is broken. Where no
    group was accepted yet, `FIRST_FAILURES` groups for which every attempt failed do."""

    allowed_in_a_row: int
    dropped: dict[str, int] = field(default_factory=dict)
    _in_a_row: int = 0
    _any_accepted: bool = False

    def accepted(self) -> None:
        self._in_a_row = 0
        self._any_accepted = True

    def drop(self, reason: str, detail: str) -> None:
        """Count one; raises BudgetExhausted with the last detail when it is one too many."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self._in_a_row += 1
        if self._in_a_row > self.allowed_in_a_row:
            raise BudgetExhausted(
                f"{self._in_a_row} prompt groups in a row were dropped ({self.dropped}); the last because: {detail}"
            )
        if not self._any_accepted and self.dropped.get(Kind.INFRA, 0) >= FIRST_FAILURES:
            raise BudgetExhausted(
                f"no prompt group was ever finished, and for {FIRST_FAILURES} every attempt failed; the last because: "
                f"{detail}"
            )


@dataclass(frozen=True)
class Wait:
    what: Callable[[], str | None]
    since: float
    deadline_s: float | None


class Watchdog:
    """Every wait of the driver has a name here; `overdue` says which ones are worth a line."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, report_after_s: float = 30.0) -> None:
        self._now = clock
        self._report_after_s = report_after_s
        self._waits: dict[int, Wait] = {}
        self._reported: dict[int, float] = {}
        self._next = 0

    @contextmanager
    def waiting(self, what: str | Callable[[], str | None], deadline_s: float | None = None) -> Iterator[None]:
        """Name a wait for as long as the block lasts. A function is called for the current name; None: the wait is
        intended (a paused pool) and not reported."""
        token, self._next = self._next, self._next + 1
        self._waits[token] = Wait((lambda: what) if isinstance(what, str) else what, self._now(), deadline_s)
        try:
            yield
        finally:
            del self._waits[token]
            self._reported.pop(token, None)

    def waits(self) -> list[dict[str, str | float]]:
        """What is waited for now, and for how many seconds it has been; what is intended is left out."""
        now = self._now()
        found = ((wait.what(), now - wait.since) for wait in self._waits.values())
        return [{"what": what, "seconds": round(seconds, 1)} for what, seconds in found if what]

    def overdue(self) -> list[str]:
        """One line per wait older than `report_after_s` since its start or its last line."""
        now = self._now()
        lines = []
        for token, wait in self._waits.items():
            if now - self._reported.get(token, wait.since) >= self._report_after_s:
                self._reported[token] = now
                limit = f", deadline {wait.deadline_s:g} s" if wait.deadline_s else ""
                if what := wait.what():
                    lines.append(f"waiting {now - wait.since:.0f} s for {what}{limit}")
        return lines
