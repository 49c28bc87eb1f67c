"""How many workers a pool should have: the decision. Pure; `autoscaler.py` gathers what it sees and carries it out.

    calls wait, and there was work for fewer only ─► as many as before it was idle, at once
    no call for `idle_s` ──────────────────────────► `min`
    the cluster has had no room for a while ───────► as many as it has room for
    training waited, and calls waited, too ────────► more: as many as would have been enough, at most twice as many
    few calls, or training does not wait ──────────► one less, if one less will still do

The first three look at this moment; the last two at the last `steps` steps since the last change, `cooldown_s` after
it. To add workers takes two signs: training waits (else more samples help nobody), and more is asked of the pool than
its workers can work on at a time (else another worker has nothing to do: the longest sample is what takes so long).
The thresholds for removing are well below those for adding, so a constant load has one answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.config.autoscale import AutoscaleConfig

LIGHT = 0.7  # of target_load: the remaining workers would be asked for less than that
ENOUGH_WAIT = 0.75  # of target_wait: with a worker less, training would wait less than that
ENOUGH_WORK = 0.8  # of their time: the remaining workers would work less than that
AHEAD = 0.999  # of the samples that max_staleness allows: they are ready, and nothing more may be sampled
NO_ROOM_S = 30.0  # a worker that has not been placed for so long will not be
PROBES_LAST = 10  # windows of `steps`, for which a number that was too small is not tried again


@dataclass(frozen=True)
class StepSeen:
    """One training step, as far as a pool is concerned."""

    waited: float  # share of the step that training waited for its batch: 0 to 1
    peak: int  # calls of the pool, carried and queued, at most
    busy: float  # share of what its workers could have worked on, averaged over the step
    memory: float | None = None  # the fullest that their key-value caches were: 0 to 1
    ahead: float | None = None  # share of what max_staleness allows to be ready that was; None: it allows nothing


@dataclass(frozen=True)
class Seen:
    """What a decision is made of. `steps`: those since the last change, the oldest first."""

    desired: int
    steps: Sequence[StepSeen]
    since_change_s: float
    calls: int  # carried and queued now
    idle_s: float  # without any
    places: int  # calls that one worker works on at a time
    settled: bool  # whether all desired workers serve
    placed: int  # workers that have a process
    unplaced_s: float = 0.0  # for how long some have had none
    room: int | None = None  # for how many more the cluster has room; None: no limit is known
    before_idle: int | None = None  # workers that there were until nothing was asked any more
    too_few: int = 0  # a number of workers that was not enough lately


@dataclass(frozen=True)
class Decision:
    """How many workers, and why. The same number as before: more are wanted, and there is no room."""

    workers: int
    why: str
    idle: bool = False  # because nothing is asked: not a sign that so many are enough
    waited: bool = False  # because the number of before was too small


def decide(limits: AutoscaleConfig, seen: Seen) -> Decision | None:
    """How many workers the pool should have, and why; None if their number should stay."""
    bounded = min(max(seen.desired, limits.min), limits.max)
    if bounded != seen.desired:
        possible = bounded if bounded < seen.desired else _within_room(bounded, seen)
        return Decision(possible, f"autoscale allows {limits.min} to {limits.max}")
    urgent = _back(limits, seen) or _idle(limits, seen) or _placeable(limits, seen)
    if urgent is not None:
        return urgent
    if seen.desired == 0 or len(seen.steps) < limits.steps or seen.since_change_s < limits.cooldown_s:
        return None
    window = Window(tuple(seen.steps[-limits.steps :]), seen)
    return _more(limits, seen, window) or _less(limits, seen, window)


def _back(limits: AutoscaleConfig, seen: Seen) -> Decision | None:
    """Work arrives at a pool that was reduced because it had none. No cool-down: whoever calls is waiting."""
    wanted = max(seen.before_idle or 0, 1, limits.min)
    if not seen.calls or wanted <= seen.desired or (seen.before_idle is None and seen.desired):
        return None
    possible = _within_room(min(wanted, limits.max), seen)
    if possible == seen.desired:
        return Decision(0, f"{seen.calls} call(s) wait, and there is no room") if possible == 0 else None
    return Decision(possible, f"{seen.calls} call(s) came after a time without any")


def _idle(limits: AutoscaleConfig, seen: Seen) -> Decision | None:
    if seen.desired <= limits.min or seen.calls or seen.idle_s < limits.idle_s:
        return None
    return Decision(limits.min, f"nothing was asked for {seen.idle_s:.0f} s", idle=True)


def _placeable(limits: AutoscaleConfig, seen: Seen) -> Decision | None:
    """Workers that have no place are given up: each try to place them would count against `max_restarts`."""
    if seen.room is None or seen.room > 0 or seen.unplaced_s < max(limits.cooldown_s, NO_ROOM_S):
        return None
    possible = max(seen.placed, limits.min)
    if possible >= seen.desired:
        return None
    return Decision(possible, f"the cluster has had room for {seen.placed} only for {seen.unplaced_s:.0f} s")


@dataclass(frozen=True)
class Window:
    """The last steps, and what they would have been with another number of workers."""

    steps: tuple[StepSeen, ...]
    seen: Seen

    @property
    def waited(self) -> float:
        return _mean([step.waited for step in self.steps])

    @property
    def peak(self) -> float:
        return _mean([float(step.peak) for step in self.steps])

    @property
    def ahead(self) -> bool:
        """Whether all was sampled that max_staleness allows."""
        shares = [step.ahead for step in self.steps if step.ahead is not None]
        return bool(shares) and _mean(shares) >= AHEAD

    def load(self, workers: int) -> float:
        """Calls at the peak for each that `workers` can work on at a time; or how full their caches would be."""
        full = _mean([step.memory or 0.0 for step in self.steps]) * self.seen.desired / workers
        return max(self.peak / (workers * self.seen.places), full)

    def waited_with(self, workers: int) -> float:
        """Share of a step that training would wait if collecting took as much longer as there are fewer workers."""
        share = min(self.waited, 0.999)
        wait = share / (1 - share) * self.seen.desired / workers
        return wait / (1 + wait)

    def busy_with(self, workers: int) -> float:
        return _mean([step.busy for step in self.steps]) * self.seen.desired / workers


def _more(limits: AutoscaleConfig, seen: Seen, window: Window) -> Decision | None:
    now = seen.desired
    waits, loaded = window.waited > limits.target_wait, window.load(now) > limits.target_load
    if not (waits and loaded) or window.ahead or not seen.settled or now >= limits.max:
        return None
    by_load = math.ceil(now * window.load(now) / limits.target_load - 1e-9)
    by_wait = math.ceil(now / max(1 - window.waited, 0.01) - 1e-9)
    wanted = min(limits.max, 2 * now, by_load, by_wait)
    possible = _within_room(wanted, seen)
    why = (
        f"training waited {window.waited:.0%} of the last {len(window.steps)} steps for samples, and at the peak "
        f"{window.peak:.0f} calls shared {now * seen.places} places" + _caches(window)
    )
    short = "" if possible >= wanted else f"; {wanted} would be needed, and there is no room for more than {possible}"
    return Decision(possible, why + short, waited=True)


def _less(limits: AutoscaleConfig, seen: Seen, window: Window) -> Decision | None:
    fewer = seen.desired - 1
    if fewer < max(limits.min, 1):
        return None
    if window.load(fewer) < LIGHT * limits.target_load:
        why = f"at the peak of the last {len(window.steps)} steps {window.peak:.0f} calls shared "
        return Decision(fewer, f"{why}{seen.desired * seen.places} places" + _caches(window))
    if not seen.settled or fewer <= seen.too_few or window.waited > limits.target_wait / 2:
        return None
    if window.waited_with(fewer) > ENOUGH_WAIT * limits.target_wait or window.busy_with(fewer) > ENOUGH_WORK:
        return None
    ready = "; all samples that max_staleness allows were ready" if window.ahead else ""
    busy = f"the workers worked {window.busy_with(seen.desired):.0%} of the time"
    return Decision(fewer, f"training waited {window.waited:.0%} of the last {len(window.steps)} steps, {busy}{ready}")


def _caches(window: Window) -> str:
    fullest = [step.memory for step in window.steps if step.memory is not None]
    return f", their key-value caches {_mean(fullest):.0%} full" if fullest else ""


def _within_room(wanted: int, seen: Seen) -> int:
    """The wish, or what can be placed of it."""
    if seen.room is None:
        return wanted
    return max(seen.desired, min(wanted, max(seen.placed, seen.desired) + seen.room))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
