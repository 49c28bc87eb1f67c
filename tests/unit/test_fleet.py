"""Membership decisions: what happened goes in, what to do comes out."""

import pytest

from actors.errors import BudgetExhausted
from orchestrator.cluster.fleet import Fleet, Start, State, Stop


def serving(desired: int, **options) -> Fleet:
    fleet = Fleet("rollout", desired, max_restarts=options.pop("max_restarts", 10), **options)
    for action in fleet.decide(0.0):
        fleet.ready(action.index, 1.0)
        fleet.joined(action.index, 2.0)
    return fleet


def test_an_empty_fleet_starts_the_desired_number_of_workers_and_no_more():
    fleet = Fleet("rollout", 3, max_restarts=0)
    assert fleet.decide(0.0) == [Start(0), Start(1), Start(2)]
    assert fleet.decide(0.1) == []


def test_a_worker_gets_no_work_before_it_joined():
    fleet = Fleet("rollout", 1, max_restarts=0)
    fleet.decide(0.0)
    fleet.ready(0, 1.0)
    assert fleet.pick(8, frozenset()) is None
    fleet.joined(0, 2.0)
    assert fleet.pick(8, frozenset()) == 0


def test_a_lost_worker_is_replaced_under_a_new_index():
    fleet = serving(2)
    assert fleet.lost(0, 5.0)
    assert fleet.decide(5.0) == [Start(2)]
    assert not fleet.lost(0, 6.0), "it is no member any more"


def test_scaling_down_drains_the_least_loaded_and_stops_it_when_idle():
    fleet = serving(3)
    fleet.add_load(0, 2)
    fleet.add_load(1, 1)
    fleet.add_load(2, 1)
    fleet.desired = 2
    assert fleet.decide(5.0) == []
    assert fleet.members[2].state is State.DRAINING
    assert fleet.pick(8, frozenset({0, 1})) in (0, 1), "a draining worker gets nothing new"
    fleet.add_load(2, -1)
    assert fleet.decide(6.0) == [Stop(2, "drained")]


def test_scaling_up_starts_only_what_is_missing():
    fleet = serving(2)
    fleet.desired = 5
    assert fleet.decide(5.0) == [Start(2), Start(3), Start(4)]


def test_workers_that_fail_to_start_are_retried_with_growing_pauses():
    fleet = Fleet("rollout", 1, max_restarts=10, backoff_s=1.0)
    assert fleet.decide(0.0) == [Start(0)]
    fleet.lost(0, 1.0)
    assert fleet.decide(2.5) == []
    assert fleet.decide(3.1) == [Start(1)]
    fleet.lost(1, 4.0)
    assert fleet.decide(7.9) == []
    assert fleet.decide(8.1) == [Start(2)]


def test_losing_more_workers_than_the_budget_ends_the_run_with_an_error():
    fleet = serving(1, max_restarts=1)
    fleet.lost(0, 3.0)
    (start,) = fleet.decide(3.0)
    fleet.ready(start.index, 4.0)
    fleet.lost(start.index, 5.0)
    with pytest.raises(BudgetExhausted, match=r"roles\.rollout\.max_restarts=1"):
        fleet.decide(5.0)


def test_a_worker_that_drains_costs_no_restart_when_it_dies():
    fleet = serving(2, max_restarts=0)
    fleet.add_load(0, 1)
    fleet.add_load(1, 2)
    fleet.desired = 1
    fleet.decide(5.0)
    fleet.lost(0, 6.0)
    assert fleet.restarts == 0
    assert fleet.decide(7.0) == []


def test_a_worker_that_does_not_start_in_time_is_stopped():
    fleet = Fleet("rollout", 1, max_restarts=3, start_timeout_s=10.0)
    fleet.decide(0.0)
    assert Stop(0, "did not start within 10 s") in fleet.decide(11.0)


def test_requests_go_to_the_least_loaded_worker_and_avoid_one_that_failed_them():
    fleet = serving(2)
    fleet.add_load(0, 1)
    assert fleet.pick(4, frozenset()) == 1
    assert fleet.pick(4, frozenset({1})) == 0
    fleet.add_load(0, 3)
    assert fleet.pick(4, frozenset({1})) == 1, "rather the one that failed than none"


def fail_to_start(fleet: Fleet, why: str, now: float, **how: bool) -> None:
    (start,) = fleet.decide(now)
    fleet.lost(start.index, now + 0.5, why, **how)


def test_three_failures_to_start_with_the_same_cause_end_the_run_with_that_cause():
    fleet = Fleet("rollout", 1, max_restarts=100)
    for attempt in range(3):
        fail_to_start(fleet, f"rollout/{attempt}: head size 16 is not supported (pid 4{attempt}1)", 100.0 * attempt)
    with pytest.raises(BudgetExhausted, match=r"rollout: 3 workers in a row .* head size 16 is not supported"):
        fleet.decide(400.0)


def test_after_failures_to_start_with_different_causes_starting_is_tried_again():
    fleet = Fleet("rollout", 1, max_restarts=100)
    for attempt, why in enumerate(["out of memory", "out of memory", "a node went", "out of memory", "a node went"]):
        fail_to_start(fleet, why, 100.0 * attempt)
    assert fleet.decide(900.0) == [Start(5)]


def test_workers_that_fail_to_start_at_the_same_time_are_one_failure():
    fleet = Fleet("rollout", 4, max_restarts=100)
    for start in fleet.decide(0.0):
        fleet.lost(start.index, 1.0, "the disk was away")
    assert len(fleet.decide(100.0)) == 4


def test_a_lack_of_room_does_not_count_as_a_failure_to_start():
    fleet = Fleet("rollout", 1, max_restarts=100)
    for attempt in range(5):
        fail_to_start(fleet, "no room for a rollout worker", 100.0 * attempt, placed=False)
    assert fleet.decide(900.0) == [Start(5)]


def test_a_worker_that_cannot_start_does_not_end_the_run_while_others_serve():
    fleet = serving(2)
    fleet.lost(0, 3.0, "killed")
    for attempt in range(5):
        fail_to_start(fleet, "its node has no such driver", 100.0 * (attempt + 1))
    assert fleet.decide(900.0) == [Start(7)]
    fleet.lost(1, 901.0, "killed")
    with pytest.raises(BudgetExhausted, match="no such driver"):
        fleet.decide(902.0)


def test_the_error_at_the_end_of_the_budget_names_the_last_loss():
    fleet = serving(1, max_restarts=0)
    fleet.lost(0, 3.0, "killed by the kernel")
    with pytest.raises(BudgetExhausted, match="the last: killed by the kernel"):
        fleet.decide(3.0)


def test_a_reserved_member_gets_nothing_else_and_is_ready_when_it_is_idle():
    fleet = serving(2)
    fleet.add_load(0, 1)
    fleet.add_load(1, 2)
    assert fleet.reserve(frozenset()) == 0
    assert not fleet.emptied(0)
    assert fleet.pick(4, frozenset()) == 1, "although the other has less to do"
    fleet.add_load(0, -1)
    assert fleet.emptied(0)
    fleet.free(0)
    assert fleet.pick(4, frozenset()) == 0


def test_an_attached_worker_is_beyond_the_desired_number_and_nothing_takes_its_place():
    fleet = serving(2)
    index = fleet.attach(3.0)
    fleet.ready(index, 4.0)
    fleet.joined(index, 5.0)
    assert fleet.decide(5.0) == [], "neither a surplus nor a substitute"
    fleet.desired = 1
    (stop,) = fleet.decide(6.0)
    assert stop == Stop(1, "scaled down"), "a worker of its own"
    fleet.stopped(1)
    assert fleet.lost(index, 7.0, "its host is gone")
    assert (fleet.decide(7.0), fleet.restarts) == ([], 0), "it was not the run's to start"


def test_a_detached_worker_finishes_what_it_has():
    fleet = serving(1)
    index = fleet.attach(3.0)
    fleet.ready(index, 4.0)
    fleet.joined(index, 5.0)
    fleet.add_load(index, 1)
    fleet.detach(index, 6.0)
    assert fleet.decide(6.0) == [] and fleet.pick(8, frozenset({0})) == 0
    fleet.add_load(index, -1)
    assert fleet.decide(7.0) == [Stop(index, "drained")]


def test_an_attached_worker_that_does_not_start_is_given_up_and_does_not_end_the_run():
    fleet = serving(1, max_restarts=0, start_timeout_s=10.0)
    index = fleet.attach(3.0)
    assert fleet.decide(14.0) == [Stop(index, "did not start within 10 s")]
    assert fleet.lost(index, 14.0, "late")
    assert fleet.decide(14.0) == []
