"""How many workers a pool should have: what is seen goes in, a number with its reason comes out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orchestrator.cluster.autoscaling import PROBES_LAST, Decision, Seen, StepSeen, decide
from orchestrator.config.autoscale import AutoscaleConfig

BUSY = StepSeen(waited=0.61, peak=100, busy=0.9)  # of 3 workers with 8 places
SEEN = Seen(desired=3, steps=[BUSY] * 5, since_change_s=600.0, calls=9, idle_s=0.0, places=8, settled=True, placed=3)


def limits(**changed: Any) -> AutoscaleConfig:
    return AutoscaleConfig(**{"min": 1, "max": 8, **changed})


def seen(*, step: dict[str, Any] | None = None, **changed: Any) -> Seen:
    steps = [replace(BUSY, **(step or {}))] * 5
    return replace(SEEN, **{"steps": steps, **changed})


def test_workers_are_added_when_training_waits_and_calls_do_and_the_reason_has_both_numbers() -> None:
    decision = decide(limits(), seen(step={"peak": 32}))
    assert decision == Decision(
        4,
        "training waited 61% of the last 5 steps for samples, and at the peak 32 calls shared 24 places",
        waited=True,
    )


@pytest.mark.parametrize(
    "calm",
    [
        seen(step={"waited": 0.15}),
        seen(step={"peak": 24}),  # as many as there are places: the longest sample is what is waited for
        seen(step={"ahead": 1.0}),  # nothing more may be sampled
        seen(settled=False),
        seen(steps=[BUSY] * 4),
        seen(since_change_s=59.0),
        seen(room=0, desired=8, placed=8),
    ],
    ids=["no wait", "no queue", "all is ready", "one starts", "few steps", "cool-down", "the most"],
)
def test_no_worker_is_added_without_every_sign(calm: Seen) -> None:
    with_all, decision = decide(limits(), seen()), decide(limits(), calm)
    assert with_all is not None and with_all.workers == 6
    assert decision is None or decision.workers <= calm.desired


def test_a_full_key_value_cache_counts_as_calls_that_wait() -> None:
    with_room = seen(step={"peak": 20, "memory": 0.5})
    full = seen(step={"peak": 20, "memory": 1.0})
    assert decide(limits(target_load=0.9), with_room) is None
    decision = decide(limits(target_load=0.9), full)
    assert decision is not None and decision.workers == 4 and "key-value caches 100% full" in decision.why


def test_no_more_workers_are_wished_than_there_is_room_for_and_the_reason_says_how_many_would_be_needed() -> None:
    one, none = decide(limits(), seen(room=1)), decide(limits(), seen(room=0))
    assert one is not None and none is not None and (one.workers, none.workers) == (4, 3)
    assert one.why.endswith("6 would be needed, and there is no room for more than 4")


def test_workers_that_cannot_be_placed_are_given_up_after_a_while() -> None:
    lost = seen(desired=5, placed=2, settled=False, room=0, steps=[])
    assert decide(limits(), replace(lost, unplaced_s=59.0)) is None, "a worker that starts has no process yet"
    assert decide(limits(), replace(lost, unplaced_s=61.0, room=1)) is None, "one of them has room"
    decision = decide(limits(), replace(lost, unplaced_s=61.0))
    assert decision == Decision(2, "the cluster has had room for 2 only for 61 s")


def test_a_pool_that_is_not_the_reason_for_a_wait_loses_a_worker() -> None:
    decision = decide(limits(), seen(step={"peak": 5}))
    assert decision == Decision(2, "at the peak of the last 5 steps 5 calls shared 24 places")


def test_workers_that_are_idle_because_samples_may_not_run_further_ahead_go_one_by_one() -> None:
    rested = seen(step={"waited": 0.01, "busy": 0.4, "ahead": 1.0})
    decision = decide(limits(), rested)
    assert decision is not None and decision.workers == 2
    assert decision.why.endswith("worked 40% of the time; all samples that max_staleness allows were ready")
    assert decide(limits(), replace(rested, too_few=2)) is None, "two were not enough lately"
    slow = {"waited": 0.09, "busy": 0.3}
    assert decide(limits(), seen(step=slow)) is not None
    assert decide(limits(), seen(step=slow, desired=2, placed=2)) is None, "training would wait 17 % with one"
    tight = seen(step={"waited": 0.01, "busy": 0.6, "ahead": 1.0})
    assert decide(limits(), tight) is None, "two would work nine tenths of the time"


@pytest.mark.parametrize("least", [0, 2])
def test_a_pool_goes_to_its_minimum_only_after_a_time_without_a_call_and_comes_back_at_the_first(least: int) -> None:
    quiet = seen(calls=0, steps=[], idle_s=299.0)
    bounds = limits(min=least)
    assert decide(bounds, quiet) is None
    gone = decide(bounds, replace(quiet, idle_s=300.0))
    assert gone == Decision(least, "nothing was asked for 300 s", idle=True)
    asleep = replace(quiet, desired=least, placed=least, before_idle=3, idle_s=9000.0, since_change_s=0.0)
    assert decide(bounds, asleep) is None
    back = decide(bounds, replace(asleep, calls=2, idle_s=0.0))
    assert back == Decision(3, "2 call(s) came after a time without any"), "at once, and as many as there were"
    if least == 0:
        stuck = decide(bounds, replace(asleep, calls=2, idle_s=0.0, room=0))
        assert stuck == Decision(0, "2 call(s) wait, and there is no room")


def test_a_number_outside_the_bounds_is_brought_within_them() -> None:
    found = [decide(limits(min=2), seen(desired=desired, steps=[])) for desired in (0, 1, 2, 8, 9)]
    assert [each and each.workers for each in found] == [2, 2, None, None, 8]


shares = st.floats(0, 1)
step_seen = st.builds(
    StepSeen,
    waited=shares,
    peak=st.integers(0, 10_000),
    busy=shares,
    memory=st.none() | shares,
    ahead=st.none() | shares,
)
bounds_of = st.builds(
    lambda least, more, **others: AutoscaleConfig(min=least, max=max(1, least + more), **others),
    st.integers(0, 20),
    st.integers(0, 20),
    target_wait=st.floats(0.01, 0.99),
    target_load=st.floats(0.05, 3),
    steps=st.integers(1, 6),
    cooldown_s=st.floats(0, 100),
    idle_s=st.floats(1, 1000),
)
anything_seen = st.builds(
    Seen,
    desired=st.integers(0, 50),
    steps=st.lists(step_seen, max_size=8),
    since_change_s=st.floats(0, 1000),
    calls=st.integers(0, 1000),
    idle_s=st.floats(0, 2000),
    places=st.integers(1, 64),
    settled=st.booleans(),
    placed=st.integers(0, 50),
    unplaced_s=st.floats(0, 500),
    room=st.none() | st.integers(0, 20),
    before_idle=st.none() | st.integers(1, 40),
    too_few=st.integers(0, 40),
)


@given(bounds_of, anything_seen)
def test_a_decision_is_within_the_bounds_and_within_the_room_and_has_a_reason(
    bounds: AutoscaleConfig, at: Seen
) -> None:
    assume(at.placed <= at.desired)
    decision = decide(bounds, at)
    if decision is None:
        return
    assert decision.why
    if decision.workers > at.desired:
        assert decision.workers <= bounds.max
        assert at.room is None or decision.workers <= at.desired + at.room
    elif decision.workers < at.desired:
        assert decision.workers >= min(bounds.min, at.desired)
        assert decision.workers >= bounds.min or at.desired > bounds.max
    if decision.workers == 0 < at.desired:
        assert bounds.min == 0 and (decision.idle or at.unplaced_s > 0)
        assert not decision.idle or (at.calls == 0 and at.idle_s >= bounds.idle_s)


def followed(bounds: AutoscaleConfig, first: int, places: int, load: Callable[[int], StepSeen]) -> list[int]:
    """The numbers of workers that a constant load leads to, a decision after each window of steps."""
    counts, too_few = [first], 0
    for _ in range(3 * PROBES_LAST):
        now = counts[-1]
        steps = [load(now)] * bounds.steps
        at = Seen(now, steps, 1e9, calls=1, idle_s=0.0, places=places, settled=True, placed=now, too_few=too_few)
        decision = decide(bounds, at)
        too_few = now if decision is not None and decision.waited else too_few
        counts.append(now if decision is None else decision.workers)
    return counts


def turns(counts: list[int]) -> int:
    """How often the direction changed."""
    moves = [after - before for before, after in pairwise(counts) if after != before]
    return sum((one > 0) is not (other > 0) for one, other in pairwise(moves))


fixed_bounds = st.builds(
    lambda most, **others: AutoscaleConfig(min=1, max=most, steps=2, **others),
    st.integers(1, 12),
    target_wait=st.floats(0.02, 0.9),
    target_load=st.floats(0.1, 2),
)


@given(
    fixed_bounds,
    st.integers(1, 12),
    st.integers(1, 32),
    st.integers(1, 400),
    st.floats(0.01, 100),
    st.booleans(),
)
def test_a_constant_load_leads_to_one_number_without_a_turn_when_time_falls_as_workers_are_added(
    bounds: AutoscaleConfig, first: int, places: int, peak: int, work: float, ahead: bool
) -> None:
    """`work`: seconds of a batch on one worker, for each second of training. With `ahead` they overlap."""

    def load(workers: int) -> StepSeen:
        collect = work / workers
        if ahead:
            return StepSeen(max(0.0, 1 - 1 / collect), peak, min(1.0, collect), None, float(collect < 1))
        return StepSeen(collect / (1 + collect), peak, min(1.0, peak / (workers * places)) * collect / (1 + collect))

    counts = followed(bounds, min(first, bounds.max), places, load)
    assert turns(counts) == 0, counts
    assert len(set(counts[-4:])) == 1, counts


@given(
    fixed_bounds,
    st.integers(1, 12),
    st.integers(1, 32),
    st.integers(0, 400),
    st.lists(st.tuples(shares, shares), min_size=12, max_size=12),
)
def test_a_constant_load_settles_whatever_the_workers_make_of_it(
    bounds: AutoscaleConfig, first: int, places: int, peak: int, made: list[tuple[float, float]]
) -> None:
    """What training waits, and what the workers work, is any function of their number."""

    def load(workers: int) -> StepSeen:
        waited, busy = made[workers - 1]
        return StepSeen(waited, peak, busy)

    counts = followed(bounds, min(first, bounds.max), places, load)
    too_few = [before for before, after in pairwise(counts) if after > before]
    assert len(too_few) == len(set(too_few)), f"a number that was too small is not tried again: {counts}"
    assert len(set(counts[-2:])) == 1, counts


@given(st.integers(2, 12), st.integers(1, 32), st.floats(1.05, 20))
def test_enough_workers_are_there_after_as_many_decisions_as_doublings(most: int, places: int, times: float) -> None:
    bounds = AutoscaleConfig(min=1, max=most, steps=1)
    peak = math.ceil(times * places)
    counts = followed(bounds, 1, places, lambda workers: StepSeen(0.95, peak, 1.0))
    enough = min(most, math.ceil(peak / places))
    assert counts.index(enough) <= math.ceil(math.log2(enough)) and counts[-1] == enough
