"""Lets the pools of a run follow their load: gathers what a decision is made of, and carries it out.

after each training step ── stepped ─┐
twice a second ─────────── look ─────┴─► decide (`autoscaling.py`) ─► Pool.resize, as `troupe scale` does
troupe scale RUN ROLE=N ── hold ────────► N workers, until `troupe scale RUN ROLE=auto`
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.cluster.autoscaling import PROBES_LAST, Decision, Seen, StepSeen, decide
from orchestrator.cluster.fleet import State
from orchestrator.cluster.pool import Event, Pool
from orchestrator.config.autoscale import AutoscaleConfig

Room = Callable[[str], Awaitable[int | None]]


@dataclass
class _Scaled:
    """One pool, and what its next decision needs of the past."""

    limits: AutoscaleConfig
    pool: Pool
    changed_at: float
    steps: deque[StepSeen] = field(default_factory=deque[StepSeen])
    whole: bool = True  # no change since the step under way began
    unplaced_since: float | None = None
    before_idle: int | None = None
    too_few: int = 0
    too_few_for: int = 0  # steps
    held: bool = False
    said: str = ""  # the last decision

    def forget(self, *, whole: bool) -> None:
        """What was seen so far says nothing about what comes."""
        self.steps.clear()
        self.pool.load.take()
        self.whole = whole


class Autoscaler:
    """Of one run. `limits`: role -> bounds and targets, of the roles that have some."""

    def __init__(
        self,
        limits: Mapping[str, AutoscaleConfig],
        event: Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits, self._event, self._clock = limits, event, clock
        self._scaled: dict[str, _Scaled] = {}
        self._deciding = asyncio.Lock()

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(self._limits)

    def attach(self, pools: Mapping[str, Pool], room: Room) -> None:
        """The pools are up. `room`: for how many more workers of a role there is room; None: no limit is known."""
        self._room = room
        for role, limits in self._limits.items():
            self._scaled[role] = _Scaled(limits, pools[role], self._clock())
            pools[role].wakes = True
            pools[role].load.rest()

    def enter(self) -> None:
        """Another phase begins: its steps are not like those of the one before."""
        for scaled in self._scaled.values():
            scaled.forget(whole=True)
            scaled.too_few = 0

    async def stepped(self, waited: float, ahead: float | None) -> None:
        """A training step is done, which waited that share of its time for its batch; `ahead`: see `StepSeen`."""
        for scaled in self._scaled.values():
            seen, pool = scaled.pool.load.take(), scaled.pool
            peak = max(0, seen.peak - len(pool.addresses) * pool.policy.places)  # the others are worked on elsewhere
            if scaled.whole:
                scaled.steps.append(StepSeen(waited, peak, seen.busy, seen.memory, ahead))
            while len(scaled.steps) > scaled.limits.steps:
                scaled.steps.popleft()
            scaled.whole = True
            scaled.too_few_for -= 1
            if scaled.too_few_for <= 0:
                scaled.too_few = 0
        await self._decide(after_step=True)

    async def look(self, held: Collection[str] = ()) -> None:
        """What cannot wait for a step. `held`: roles that have the number of workers that somebody asked for."""
        for role, scaled in self._scaled.items():
            self._hold(role, scaled, role in held)
        await self._decide(after_step=False)

    def described(self, role: str) -> dict[str, Any]:
        """For those who look from outside; empty for a role that has a fixed number of workers."""
        scaled = self._scaled.get(role)
        if scaled is None:
            return {}
        bounds = {"min": scaled.limits.min, "max": scaled.limits.max}
        return {"autoscale": {**bounds, "held": scaled.held, "said": scaled.said}}

    def _hold(self, role: str, scaled: _Scaled, held: bool) -> None:
        if held is not scaled.held:
            scaled.held, scaled.pool.wakes = held, not held
            scaled.before_idle = None
            scaled.forget(whole=False)
            self._event("autoscale_held" if held else "autoscale_goes_on", {"role": role})

    async def _decide(self, *, after_step: bool) -> None:
        async with self._deciding:
            for role, scaled in self._scaled.items():
                if not scaled.held and (decision := decide(scaled.limits, await self._seen(role, scaled))) is not None:
                    self._carry_out(role, scaled, decision, after_step)

    async def _seen(self, role: str, scaled: _Scaled) -> Seen:
        pool, now = scaled.pool, self._clock()
        members = [member for member in pool.fleet.members.values() if not member.attached]
        desired, placed = pool.fleet.desired, sum(member.index in pool.workers for member in members)
        if placed >= desired:
            scaled.unplaced_since = None
        elif scaled.unplaced_since is None:
            scaled.unplaced_since = now
        return Seen(
            desired=desired,
            steps=tuple(scaled.steps),
            since_change_s=now - scaled.changed_at,
            calls=pool.load.calls,
            idle_s=pool.load.idle_s,
            places=pool.policy.places,
            settled=len(members) == desired and all(member.state is State.SERVING for member in members),
            placed=placed,
            unplaced_s=0.0 if scaled.unplaced_since is None else now - scaled.unplaced_since,
            room=await self._room(role),
            before_idle=scaled.before_idle,
            too_few=scaled.too_few,
        )

    def _carry_out(self, role: str, scaled: _Scaled, decision: Decision, after_step: bool) -> None:
        before = scaled.pool.fleet.desired
        if decision.workers == before:
            scaled.said = f"{before}: {decision.why}"
            return
        scaled.said = f"{before} -> {decision.workers}: {decision.why}"
        scaled.changed_at = self._clock()
        scaled.before_idle = (scaled.before_idle or before) if decision.idle else None
        if decision.waited:
            scaled.too_few, scaled.too_few_for = before, PROBES_LAST * scaled.limits.steps
        scaled.forget(whole=after_step)
        scaled.pool.resize(decision.workers, why=decision.why)
