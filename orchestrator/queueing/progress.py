"""What becomes of a run whose process is gone: it is over, waits for its turn again, or is resumed. Pure.

A failure is the end of a process that has not said how it ended: killed, its node lost, its Ray restarted, or an
exception. The run is resumed from its newest checkpoint after a back-off that doubles each time. After
`Budget.failures` failures with no later checkpoint between them it is given up, so an error that repeats is not tried
for ever; each checkpoint of a later step gives the whole budget back. What is refused would be refused again: it is
given up at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from orchestrator.queueing.entry import Entry, Stage

LONGEST_BACKOFF_S = 300.0


class Process(StrEnum):
    """How the process of a run stands."""

    ALIVE = "alive"  # or about to start
    GONE = "gone"
    LOST = "lost"  # it was ordered, and nobody knows of it: the Ray that had it was started anew
    UNKNOWN = "unknown"  # nobody answers who could tell


@dataclass(frozen=True)
class Seen:
    """What is seen of a run that has been started. `ended`: what its process said of its end since it was started.
    `spoke`: whether it has said anything since. `stopped`: it was ended by Ray's Job API, on request. `refused`: the
    words in which it was refused, if it was. `said`: its last words otherwise. `saved_step`: of its newest
    checkpoint."""

    process: Process
    ended: Literal["finished", "interrupted"] | None = None
    spoke: bool = False
    stopped: bool = False
    refused: str | None = None
    said: str = ""
    saved_step: int = 0


@dataclass(frozen=True)
class Budget:
    """`failures`: how many in a row end a run. `backoff_s`: the wait after the first."""

    failures: int = 3
    backoff_s: float = 5.0

    def wait_s(self, failures: int) -> float:
        return min(LONGEST_BACKOFF_S, self.backoff_s * 2 ** min(failures - 1, 30))


def after(entry: Entry, seen: Seen, budget: Budget, now: float) -> Entry:
    """The entry of a run, given what is seen of its process."""
    if entry.stage in (Stage.WAITING, Stage.OVER) or seen.process in (Process.ALIVE, Process.UNKNOWN):
        return entry
    if seen.ended == "finished":
        return entry.over()
    if entry.stage is Stage.STOPPING:
        return entry.over("it was stopped", stopped=True)
    if entry.stage is Stage.PREEMPTING:
        return replace(entry, stage=Stage.WAITING, preempted=True, reason="was preempted", not_before=0.0)
    if seen.ended == "interrupted" or seen.stopped:
        return entry.over("it was stopped", stopped=True)
    if seen.refused is not None:
        return entry.over(seen.refused)
    if seen.process is Process.LOST and not seen.spoke:  # nothing of it has failed
        return replace(entry, stage=Stage.WAITING, reason="its process was lost before it began", not_before=0.0)
    return _after_failure(entry, seen, budget, now)


def _after_failure(entry: Entry, seen: Seen, budget: Budget, now: float) -> Entry:
    failures = 1 if seen.saved_step > entry.saved_step else entry.failures + 1
    since = f" since step {seen.saved_step} was saved" if seen.saved_step else ""
    counted = f"failures: {failures} of {budget.failures}{since}"
    said = seen.said or "its process was killed, or its node was lost"
    entry = replace(entry, failures=failures, saved_step=seen.saved_step, preempted=False)
    if failures >= budget.failures:
        return entry.over(f"given up ({counted}): {said}")
    wait_s = budget.wait_s(failures)
    where = f"step {seen.saved_step}" if seen.saved_step else "the beginning, because it left no checkpoint"
    reason = f"it failed, and goes on from {where} after {wait_s:g} s ({counted}): {said}"
    return replace(entry, stage=Stage.WAITING, reason=reason, not_before=now + wait_s)
