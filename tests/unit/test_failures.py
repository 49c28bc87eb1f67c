"""What failures mean, and who waits on what."""

import pytest

from actors.errors import BudgetExhausted, DataFailure, InfraFailure
from orchestrator.cluster.failures import Kind, Ledger, Watchdog, classify, enough_survive


def test_failures_are_classified_by_their_class():
    assert classify(InfraFailure("gone")) is Kind.INFRA
    assert classify(DataFailure("no answer in it")) is Kind.DATA
    assert classify(ZeroDivisionError()) is Kind.BUG


@pytest.mark.parametrize(
    ("survivors", "wanted", "enough"), [(6, 8, True), (5, 8, False), (1, 1, True), (2, 3, False), (3, 3, True)]
)
def test_a_group_trains_with_three_quarters_of_its_samples(survivors, wanted, enough):
    assert enough_survive(survivors, wanted) is enough


def test_drops_are_counted_by_reason_and_a_success_resets_the_row():
    ledger = Ledger(allowed_in_a_row=2)
    for _ in range(3):
        ledger.drop("data", "bad row")
        ledger.accepted()
    assert ledger.dropped == {"data": 3}


def test_too_many_drops_in_a_row_end_the_run_with_the_last_reason():
    ledger = Ledger(allowed_in_a_row=1)
    ledger.drop("infra", "worker 3 died")
    with pytest.raises(BudgetExhausted, match="the reward raised KeyError"):
        ledger.drop("data", "the reward raised KeyError")


def test_eight_infrastructure_failures_end_a_run_without_a_single_accepted_group():
    ledger = Ledger(allowed_in_a_row=64)
    for _ in range(7):
        ledger.drop("infra", "reward/1 died")
    with pytest.raises(BudgetExhausted, match=r"no prompt group was ever finished.*reward/8 died"):
        ledger.drop("infra", "reward/8 died")


def test_after_an_accepted_group_the_allowed_number_of_failures_is_tolerated():
    ledger = Ledger(allowed_in_a_row=64)
    ledger.accepted()
    for _ in range(20):
        ledger.drop("infra", "reward/1 died")
    assert ledger.dropped == {"infra": 20}


def test_the_watchdog_names_long_waits_once_per_interval():
    now = [0.0]
    watchdog = Watchdog(clock=lambda: now[0], report_after_s=30.0)
    with watchdog.waiting("2 rollout workers to start", 300):
        now[0] = 29.0
        assert watchdog.overdue() == []
        now[0] = 31.0
        assert watchdog.overdue() == ["waiting 31 s for 2 rollout workers to start, deadline 300 s"]
        assert watchdog.overdue() == []
        now[0] = 62.0
        assert len(watchdog.overdue()) == 1
    now[0] = 100.0
    assert watchdog.overdue() == []
