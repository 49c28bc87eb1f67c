"""Which waiting run is started, which running one makes room, and what the others say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning.bundles import Bundle, ClusterView, Node, fit
from orchestrator.queueing.decisions import Active, Decision, Room, Waiting, decide

CPUS = 8.0


def bundles(*cpus: float) -> tuple[Bundle, ...]:
    return tuple(Bundle((f"role{index}",), {"CPU": each}) for index, each in enumerate(cpus))


def waits(run: str, *cpus: float, priority: int = 0, submitted: float = 0.0, **more: object) -> Waiting:
    return Waiting(run, priority, submitted, bundles(*cpus), **more)  # pyright: ignore[reportArgumentType]


def runs(run: str, cpus: float, *, priority: int = 0, started: float = 0.0, node: str = "a", **more: object) -> Active:
    return Active(run, priority, started, {node: {"CPU": cpus}}, **more)  # pyright: ignore[reportArgumentType]


def room(*active: Active, others: float = 0.0, nodes: tuple[str, ...] = ("a",)) -> Room:
    """Nodes of 8 CPUs; `others` are taken on each by somebody else."""
    whole = tuple(Node(name, {"CPU": CPUS}) for name in nodes)
    held = {name: others + sum(run.holds.get(name, {}).get("CPU", 0.0) for run in active) for name in nodes}
    return Room(ClusterView(whole), ClusterView(tuple(Node(name, {"CPU": CPUS - held[name]}) for name in nodes)))


def decided(waiting: list[Waiting], *active: Active, preempt: bool = False, **more: object) -> Decision:
    return decide(waiting, active, room(*active, **more), 100.0, preempt=preempt)  # pyright: ignore[reportArgumentType]


def test_what_fits_is_started_and_what_does_not_waits_and_says_what_it_waits_for():
    found = decided([waits("new", 3, 2)], runs("x", 4), runs("y", 2))
    assert found == Decision((), {}, {"new": "waits for 5 CPU: 2 of 8 are free (run x holds 4, run y holds 2)"})
    assert decided([waits("new", 3, 2)], runs("y", 2)).start == ("new",)


def test_what_somebody_else_holds_is_named_as_that():
    found = decided([waits("new", 5)], runs("x", 2), others=3)
    assert found.reasons == {"new": "waits for 5 CPU: 3 of 8 are free (run x holds 2, others hold 3)"}


def test_the_higher_priority_is_first_and_among_equals_the_one_that_was_submitted_first():
    waiting = [waits("late", 4, submitted=2), waits("early", 4, submitted=1), waits("high", 4, priority=1, submitted=3)]
    found = decided(waiting)
    assert found.start == ("high", "early")
    assert found.reasons == {"late": "waits for 4 CPU: 0 of 8 are free (run early holds 4, run high holds 4)"}


def test_a_small_run_does_not_pass_a_large_one_of_higher_priority_that_waits_for_others_to_end():
    found = decided([waits("small", 1), waits("large", 8, priority=5)], runs("x", 4))
    assert found.start == ()
    assert found.reasons["small"] == "waits for its turn: run large is before it (priority 5, this one 0)"
    equal = decided([waits("small", 1, submitted=2), waits("large", 8, submitted=1)], runs("x", 4))
    assert equal.reasons["small"].endswith("(both have priority 0, and it was submitted earlier)")


def test_a_run_that_no_node_could_ever_hold_says_so_and_is_passed():
    found = decided([waits("huge", 9, priority=5), waits("small", 1)])
    assert found.start == ("small",)
    assert found.reasons["huge"].startswith("it can never start on the nodes that are there")
    assert "each needs 9 CPU: the largest node has 8 CPU" in found.reasons["huge"]


def test_in_the_back_off_of_a_run_others_start_beside_it_and_not_in_its_room():
    failed = waits("failed", 6, not_before=101.0, why="it failed")
    beside, large = waits("beside", 2, submitted=1), waits("large", 3, submitted=1)
    assert decided([failed, beside]) == Decision(("beside",), {}, {"failed": "it failed"})
    found = decided([failed, large])
    assert found.start == ()
    assert found.reasons == {"failed": "it failed", "large": "waits for 3 CPU: 2 of 8 are free (run failed holds 6)"}
    assert decided([failed, waits("high", 8, priority=1)]).start == ("high",), "a higher priority is before it"
    later = decided([waits("failed", 8, priority=5, not_before=100.0, why="it failed"), waits("small", 1)])
    assert later.start == ("failed",)


def test_room_that_a_started_run_has_not_reserved_yet_is_not_given_twice():
    starting = Active("x", 0, 0.0, claims=bundles(4, 1))
    found = decided([waits("new", 4)], starting)
    assert found.reasons == {"new": "waits for 4 CPU: 3 of 8 are free (run x holds 5)"}


def test_free_resources_that_lie_on_several_nodes_are_no_room_for_one_process():
    found = decided([waits("new", 6)], runs("x", 4), runs("y", 4, node="b"), nodes=("a", "b"))
    assert found.start == ()
    assert found.reasons["new"].startswith("waits for room on one node: enough is free in all; role0: no place for 1")


def test_a_run_preempts_lower_priorities_only_if_that_is_switched_on():
    waiting, low = [waits("high", 8, priority=1)], runs("low", 4)
    assert decided(waiting, low).preempt == {}
    found = decided(waiting, low, preempt=True)
    assert found.preempt == {"low": "high"}
    assert found.reasons["high"].endswith("(run low holds 4); low makes room")


def test_equal_priority_is_never_preempted():
    assert decided([waits("new", 8, priority=1)], runs("old", 4, priority=1), preempt=True).preempt == {}


def test_the_lowest_priority_and_the_latest_start_make_room_and_no_more_than_needed():
    active = [runs("a", 2, started=1), runs("b", 2, started=2), runs("c", 2, priority=1, started=3)]
    assert decided([waits("high", 4, priority=5)], *active, preempt=True).preempt == {"b": "high"}
    assert set(decided([waits("high", 6, priority=5)], *active, preempt=True).preempt) == {"a", "b"}
    small = [runs("tiny", 0.5, started=9), runs("big", 7.5, started=1)]
    assert set(decided([waits("high", 7, priority=5)], *small, preempt=True).preempt) == {"big"}, "tiny is not enough"


def test_nobody_is_preempted_in_vain():
    active = [runs("low", 4), runs("high", 4, priority=9)]
    assert decided([waits("new", 8, priority=5)], *active, preempt=True).preempt == {}


def test_who_leaves_already_is_awaited_and_nobody_else_is_told_to_leave():
    active = [runs("leaves", 4, leaving=True), runs("stays", 4)]
    found = decided([waits("new", 4, priority=5)], *active, preempt=True)
    assert found.preempt == {} and found.start == ()
    assert found.reasons["new"].endswith("; leaves makes room")


RUN = st.tuples(st.integers(0, 3), st.integers(1, 10))  # priority, CPUs
CASE = st.tuples(st.lists(RUN, max_size=6), st.lists(RUN.filter(lambda run: run[1] <= CPUS), max_size=4))


def case(drawn: tuple[list[tuple[int, int]], list[tuple[int, int]]]) -> tuple[list[Waiting], list[Active]]:
    """Running runs fill the node in their order, as long as they fit."""
    waiting = [waits(f"w{n}", cpus, priority=priority, submitted=n) for n, (priority, cpus) in enumerate(drawn[0])]
    active: list[Active] = []
    for n, (priority, cpus) in enumerate(drawn[1]):
        if sum(run.holds["a"]["CPU"] for run in active) + cpus <= CPUS:
            active.append(runs(f"r{n}", cpus, priority=priority, started=n))
    return waiting, active


@given(CASE, st.booleans())
def test_what_is_decided_fits_obeys_the_order_and_leaves_nobody_without_a_word(drawn: object, preempt: bool):
    waiting, active = case(drawn)  # pyright: ignore[reportArgumentType]
    found = decided(waiting, *active, preempt=preempt)
    by_name = {run.run: run for run in waiting}
    started = [by_name[run] for run in found.start]
    assert None not in fit([bundle for run in started for bundle in run.bundles], room(*active).free).nodes
    assert {*found.start, *found.reasons} == set(by_name) and not set(found.start) & set(found.reasons)
    order = [(-run.priority, run.submitted) for run in started]
    assert order == sorted(order)
    for left in (by_name[run] for run in found.reasons):
        if left.bundles[0].resources["CPU"] <= CPUS:  # it could start once others have ended: nobody passes it
            assert all((-run.priority, run.submitted) < (-left.priority, left.submitted) for run in started)


@given(CASE)
def test_preemption_takes_lower_priorities_alone_and_exactly_as_many_as_are_needed(drawn: object):
    waiting, active = case(drawn)  # pyright: ignore[reportArgumentType]
    found = decided(waiting, *active, preempt=True)
    if not found.preempt:
        return
    [winner] = set(found.preempt.values())
    first = next(run for run in waiting if run.run == winner)
    gone = [run for run in active if run.run in found.preempt]
    assert all(run.priority < first.priority for run in gone)
    stay = [run for run in active if run not in gone]
    assert winner in decided(waiting, *stay, preempt=False).start, "once they have left, it starts"
    for spared in gone:
        assert winner not in decided(waiting, *stay, replace(spared), preempt=False).start, "none left in vain"


@pytest.mark.parametrize("free", [0.0, 1.0])
def test_places_are_a_resource_like_any_other(free: float):
    place = (Bundle(("a run",), {"place": 1.0}),)
    view = [ClusterView((Node("the service", {"place": each}),)) for each in (1.0, free)]
    active = [Active("x", 0, 0.0, {"the service": {"place": 1.0}})] if not free else []
    found = decide([Waiting("new", 0, 0.0, place)], active, Room(*view), 0.0, preempt=False)
    assert found.start == (("new",) if free else ())
    assert found.reasons == ({} if free else {"new": "waits for 1 place: 0 of 1 are free (run x holds 1)"})
