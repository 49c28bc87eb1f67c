"""Work that does not end is stopped, and nothing else is."""

from __future__ import annotations

import threading
import time
import traceback

import pytest

from orchestrator.data.time_limit import OverTime, TimeLimit


def endless() -> None:
    while True:
        try:
            for number in range(1000):
                _ = number * number
        except Exception:  # a limit must not be swallowed by a program that swallows its own errors
            pass


def stopped_in(limit_s: float) -> str:
    """The innermost function in which an endless loop was stopped."""
    with TimeLimit(limit_s) as limit, pytest.raises(OverTime) as over:
        limit.call(endless)
    return traceback.extract_tb(over.value.stopped_at)[-1].name


def test_an_endless_loop_is_stopped_and_its_place_reported() -> None:
    assert stopped_in(0.05) == "endless"


def test_an_endless_loop_is_stopped_in_a_thread_that_is_not_the_main_one() -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(stopped_in(0.05)))
    thread.start()
    thread.join(30)
    assert found == ["endless"]


def test_a_result_and_an_error_of_the_work_come_through() -> None:
    with TimeLimit(5) as limit:
        assert limit.call(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            limit.call(lambda: 1 // 0)


def test_waiting_does_not_count_towards_the_limit() -> None:
    with TimeLimit(0.02) as limit:
        assert limit.call(lambda: time.sleep(0.2) or "slept") == "slept"


def test_a_call_that_ends_as_the_limit_strikes_has_one_outcome_and_no_interrupt_comes_after_it() -> None:
    """The race that the claims are for. An interrupt that comes late would end this test."""
    outcomes: list[str] = []
    with TimeLimit(0.004) as limit:
        for call in range(60):
            until = time.thread_time() + 0.004 + call % 10 / 5000

            def work(until: float = until) -> str:
                while time.thread_time() < until:
                    pass
                return "returned"

            try:
                outcomes.append(limit.call(work))
            except OverTime:
                outcomes.append("stopped")
    assert len(outcomes) == 60
