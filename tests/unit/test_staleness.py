"""The staleness contract, as arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import StalenessError
from orchestrator.collection.staleness import Contract


def admitted(contract: Contract, version: int) -> int:
    """How many groups may have started by the time the policy is at `version`, if nothing finishes."""
    running = 0
    while contract.may_admit(accepted=0, running=running, version=version):
        running += 1
    return running


def test_synchronous_training_admits_one_batch_per_version():
    contract = Contract(max_staleness=0, batch=4)
    assert [admitted(contract, version) for version in range(3)] == [4, 8, 12]


def test_each_step_of_staleness_admits_one_more_batch():
    assert [admitted(Contract(eta, batch=4), 0) for eta in range(3)] == [4, 8, 12]


def test_versions_before_the_phase_do_not_count():
    contract = Contract(max_staleness=1, batch=2, first_version=100)
    assert admitted(contract, 100) == 4


def test_nothing_is_admitted_that_no_step_of_the_phase_would_train():
    contract = Contract(max_staleness=2, batch=4, first_version=10, batches=3)
    assert [admitted(contract, version) for version in (10, 11, 12, 13)] == [12, 12, 12, 12]


@given(eta=st.integers(0, 4), batch=st.integers(1, 5), data=st.data())
def test_groups_consumed_in_order_of_admission_are_never_too_old(eta, batch, data):
    contract = Contract(eta, batch)
    started, version, consumed = [], 0, 0
    for _ in range(30):
        while contract.may_admit(accepted=consumed, running=len(started) - consumed, version=version) and data.draw(
            st.booleans()
        ):
            started.append(version)
        if len(started) - consumed >= batch:
            contract.check(started[consumed : consumed + batch], version=version)
            consumed, version = consumed + batch, version + 1


def test_a_batch_with_an_old_token_is_refused_with_the_numbers():
    with pytest.raises(StalenessError, match=r"version 7 .* tokens of version 4; max_staleness=2 allows 5"):
        Contract(2, 8).check([7, 4, 6], version=7)


def test_a_group_is_too_old_exactly_when_the_next_version_could_not_train_it():
    contract = Contract(max_staleness=1, batch=8)
    assert not contract.too_old(4, next_version=5)
    assert contract.too_old(3, next_version=5)
