"""Who belongs to an elastic pool: desired state and the decisions that lead to it. Pure; the clock is an argument.

    STARTING ──ready──► JOINING ──weights acknowledged──► SERVING ──scale down──► DRAINING ──idle──► GONE
        │                  │                                 │                                        ▲
        └──────────────────┴──── died, silent, or stale ─────┴────────────────────────────────────────┘

A replacement is a new member with a new index: it inherits neither the name nor the failures of the one it replaces.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from enum import StrEnum

from actors.errors import BudgetExhausted


class State(StrEnum):
    STARTING = "starting"
    JOINING = "joining"  # up, but without current weights: gets no work
    SERVING = "serving"
    DRAINING = "draining"  # finishes what it has, gets nothing new


ALIVE = (State.STARTING, State.JOINING, State.SERVING)
SAME_IN_A_ROW = 3  # failures at start with one cause: the next start would fail, too


@dataclass(frozen=True)
class Member:
    index: int
    state: State
    since: float  # seconds on the pool's clock
    load: int = 0  # calls in flight
    reserved: bool = False  # for one call that must be alone: it gets nothing else, and finishes what it has
    attached: bool = False  # started elsewhere: beyond the desired number, and not replaced when it is lost


@dataclass(frozen=True)
class Start:
    index: int


@dataclass(frozen=True)
class Stop:
    index: int
    why: str


Action = Start | Stop


@dataclass
class Fleet:
    """The members of one pool. Methods record what happened; `decide` says what to do about it."""

    role: str
    desired: int
    max_restarts: int
    backoff_s: float = 0.5
    start_timeout_s: float = 300.0
    members: dict[int, Member] = field(default_factory=dict)
    restarts: int = 0
    _next_index: int = 0
    _failed_starts: int = 0
    _not_before: float = 0.0
    _last_loss: str = ""
    _start_failure: str = ""  # the last one
    _same_failures: int = 0  # how often it came in a row; members that started at the same time count once
    _counted_at: float = 0.0

    def decide(self, now: float) -> list[Action]:
        """What to start and stop so that the fleet becomes what is desired. Raises BudgetExhausted."""
        late = [m for m in self._in(State.STARTING) if now - m.since > self.start_timeout_s]
        stops = [Stop(m.index, f"did not start within {self.start_timeout_s:g} s") for m in late]
        stops += [Stop(m.index, "drained") for m in self._in(State.DRAINING) if m.load == 0]
        alive = [m for m in self.members.values() if m.state in ALIVE and m not in late and not m.attached]
        surplus = len(alive) - self.desired
        if surplus > 0:
            for member in self._least_useful(alive)[:surplus]:
                self.members[member.index] = replace(member, state=State.DRAINING, since=now)
                if member.load == 0:
                    stops.append(Stop(member.index, "scaled down"))
        return [*stops, *self._starts(-surplus, now)]

    def attach(self, now: float) -> int:
        """A member that was started elsewhere: its index."""
        index, self._next_index = self._next_index, self._next_index + 1
        self.members[index] = Member(index, State.STARTING, now, attached=True)
        return index

    def detach(self, index: int, now: float) -> None:
        """It finishes what it has, and `decide` stops it then."""
        member = self.members.get(index)
        if member is not None:
            self.members[index] = replace(member, state=State.DRAINING, since=now)

    @property
    def fails_to_start(self) -> bool:
        """Whether so many starts in a row failed for the same reason that the next one would, too."""
        return self._same_failures >= SAME_IN_A_ROW

    def _starts(self, missing: int, now: float) -> list[Start]:
        if missing <= 0 or now < self._not_before:
            return []
        if self.fails_to_start and not self._in(State.SERVING):
            raise BudgetExhausted(
                f"{self.role}: {SAME_IN_A_ROW} workers in a row failed to start for the same reason, and none serves; "
                f"the last: {self._start_failure}"
            )
        if self.restarts > self.max_restarts:
            raise BudgetExhausted(
                f"{self.role}: {self.restarts} workers were lost, roles.{self.role}.max_restarts={self.max_restarts}; "
                f"the last: {self._last_loss or 'no reason is known'}; all of them are in the run's events.jsonl"
            )
        started = []
        for _ in range(missing):
            self.members[self._next_index] = Member(self._next_index, State.STARTING, now)
            started.append(Start(self._next_index))
            self._next_index += 1
        return started

    @staticmethod
    def _least_useful(members: list[Member]) -> list[Member]:
        order = {State.STARTING: 0, State.JOINING: 1, State.SERVING: 2}
        return sorted(members, key=lambda m: (order[m.state], m.load, -m.index))

    def _in(self, state: State) -> list[Member]:
        return [member for member in self.members.values() if member.state is state]

    def waits(self, index: int) -> None:
        """Its start waits for the turn of its role, and has no deadline until `begins`."""
        self._since(index, math.inf)

    def begins(self, index: int, now: float) -> None:
        """Its start begins."""
        self._since(index, now)

    def _since(self, index: int, when: float) -> None:
        member = self.members.get(index)
        if member is not None:
            self.members[index] = replace(member, since=when)

    def ready(self, index: int, now: float) -> None:
        """Its process is up."""
        self._move(index, State.STARTING, State.JOINING, now)

    def joined(self, index: int, now: float) -> None:
        """It acknowledged the current weights, or needs none."""
        self._move(index, State.JOINING, State.SERVING, now)
        self._failed_starts = self._same_failures = 0

    def _move(self, index: int, source: State, target: State, now: float) -> None:
        member = self.members.get(index)
        if member is not None and member.state is source:
            self.members[index] = replace(member, state=target, since=now)

    def lost(self, index: int, now: float, why: str = "", *, placed: bool = True) -> bool:
        """Removes a member that died or was evicted. True if it was one; counted against the budget unless it was
        draining. With `placed=False` there was no room for it, so its loss says nothing about the worker itself."""
        member = self.members.pop(index, None)
        if member is None:
            return False
        if member.attached:
            return True
        self._last_loss = why
        if member.state is not State.DRAINING:
            self.restarts += 1
        if member.state is State.STARTING:
            self._failed_starts += 1
            self._not_before = now + min(30.0, self.backoff_s * 2**self._failed_starts)
            if placed and why:
                self._count_start_failure(why, member.since, now)
        return True

    def _count_start_failure(self, why: str, started: float, now: float) -> None:
        if _without_numbers(why) != _without_numbers(self._start_failure):
            self._same_failures = 0
        elif self._same_failures and started < self._counted_at:
            return  # it was already starting when the last one was counted: the same incident
        self._start_failure, self._counted_at = why, now
        self._same_failures += 1

    def stopped(self, index: int) -> None:
        """It was stopped on purpose."""
        self.members.pop(index, None)

    def add_load(self, index: int, change: int) -> None:
        member = self.members.get(index)
        if member is not None:
            self.members[index] = replace(member, load=member.load + change)

    def pick(self, slots: int, avoid: frozenset[int]) -> int | None:
        """The serving member with most free slots; one to avoid only if there is no other."""
        return self._least_loaded([m for m in self._unreserved() if m.load < slots], avoid)

    def reserve(self, avoid: frozenset[int]) -> int | None:
        """Keep a serving member for one call that must be alone. It may still have calls to finish: `emptied`."""
        index = self._least_loaded(self._unreserved(), avoid)
        if index is not None:
            self.members[index] = replace(self.members[index], reserved=True)
        return index

    def emptied(self, index: int) -> bool:
        """Whether a reserved member is idle. Also true if it no longer serves, so that callers stop waiting for it."""
        member = self.members.get(index)
        return member is None or member.state is not State.SERVING or member.load == 0

    def free(self, index: int) -> None:
        """It is reserved no longer."""
        if index in self.members:
            self.members[index] = replace(self.members[index], reserved=False)

    def serves(self, index: int) -> bool:
        return index in self.members and self.members[index].state is State.SERVING

    def _unreserved(self) -> list[Member]:
        return [m for m in self._in(State.SERVING) if not m.reserved]

    @staticmethod
    def _least_loaded(members: list[Member], avoid: frozenset[int]) -> int | None:
        preferred = [m for m in members if m.index not in avoid] or members
        return min(preferred, key=lambda m: (m.load, m.index)).index if preferred else None


def _without_numbers(text: str) -> str:
    """Failures of one cause differ in the worker's index, process, identifiers and times."""
    return re.sub(r"\b[0-9a-f]{8,}\b|\d+(?:\.\d+)?", "#", text)
