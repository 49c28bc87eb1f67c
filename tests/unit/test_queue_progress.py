"""What becomes of a run whose process is gone, and the file in which it is kept."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.planning.bundles import Bundle
from orchestrator.queueing.entry import Entry, Stage, change, read, write
from orchestrator.queueing.progress import Budget, Process, Seen, after

BUDGET = Budget(failures=3, backoff_s=5.0)
STARTED = Entry(1, 10.0, (), Stage.STARTED, started=20.0)
GONE = Seen(Process.GONE, spoke=True)


def seen(entry: Entry, found: Seen, now: float = 100.0) -> Entry:
    return after(entry, found, BUDGET, now)


@pytest.mark.parametrize("process", [Process.ALIVE, Process.UNKNOWN])
@pytest.mark.parametrize("stage", [Stage.STARTED, Stage.PREEMPTING, Stage.STOPPING])
def test_while_its_process_lives_or_nobody_can_tell_a_run_is_left_as_it_is(process: Process, stage: Stage):
    entry = replace(STARTED, stage=stage)
    assert seen(entry, Seen(process)) == entry


def test_a_run_that_has_finished_is_over_whatever_was_asked_of_it():
    for stage in (Stage.STARTED, Stage.PREEMPTING, Stage.STOPPING):
        found = seen(replace(STARTED, stage=stage), replace(GONE, ended="finished"))
        assert (found.stage, found.stopped, found.reason) == (Stage.OVER, False, "")


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        (STARTED, replace(GONE, ended="interrupted")),
        (STARTED, replace(GONE, stopped=True)),  # `ray job stop`, before it could say anything
        (replace(STARTED, stage=Stage.STOPPING), GONE),
        (replace(STARTED, stage=Stage.STOPPING), Seen(Process.LOST)),
    ],
)
def test_a_run_that_somebody_has_stopped_is_not_started_again(entry: Entry, found: Seen):
    over = seen(entry, found)
    assert (over.stage, over.stopped) == (Stage.OVER, True)


@pytest.mark.parametrize("ended", ["interrupted", None])
def test_a_run_that_made_room_waits_in_its_old_place_and_has_not_failed(ended: object):
    entry = replace(STARTED, stage=Stage.PREEMPTING, failures=1)
    found = seen(entry, replace(GONE, ended=ended))  # pyright: ignore[reportArgumentType]
    assert (found.stage, found.preempted, found.submitted, found.failures) == (Stage.WAITING, True, 10.0, 1)


def test_what_was_refused_is_given_up_at_once_with_its_words():
    found = seen(STARTED, replace(GONE, refused="no such data"))
    assert (found.stage, found.stopped, found.reason) == (Stage.OVER, False, "no such data")


def test_a_process_that_was_killed_is_resumed_after_a_back_off_that_doubles():
    first = seen(STARTED, replace(GONE, saved_step=40))
    assert (first.stage, first.failures, first.not_before) == (Stage.WAITING, 1, 105.0)
    assert first.reason == (
        "it failed, and goes on from step 40 after 5 s (failures: 1 of 3 since step 40 was saved): "
        "its process was killed, or its node was lost"
    )
    second = seen(replace(first, stage=Stage.STARTED), replace(GONE, saved_step=40))
    assert (second.failures, second.not_before) == (2, 110.0)
    assert Budget(100, 5.0).wait_s(50) == 300.0, "it does not grow for ever"


def test_an_error_that_repeats_ends_the_run_once_the_budget_is_spent():
    entry = STARTED
    for _ in range(3):
        entry = seen(replace(entry, stage=Stage.STARTED), replace(GONE, said="ValueError: mine"))
    assert (entry.stage, entry.failures) == (Stage.OVER, 3)
    assert entry.reason == "given up (failures: 3 of 3): ValueError: mine"


def test_a_checkpoint_of_a_later_step_gives_the_whole_budget_back():
    entry = replace(STARTED, failures=2, saved_step=40)
    assert seen(entry, replace(GONE, saved_step=40)).stage is Stage.OVER
    later = seen(entry, replace(GONE, saved_step=41))
    assert (later.stage, later.failures, later.saved_step) == (Stage.WAITING, 1, 41)


def test_a_run_whose_ray_was_started_anew_is_resumed_and_one_that_had_not_begun_has_not_failed():
    begun = seen(STARTED, Seen(Process.LOST, spoke=True))
    assert (begun.stage, begun.failures) == (Stage.WAITING, 1)
    not_begun = seen(STARTED, Seen(Process.LOST))
    assert (not_begun.stage, not_begun.failures, not_begun.not_before) == (Stage.WAITING, 0, 0.0)


def test_who_is_stopped_while_it_waits_never_starts_and_who_is_over_stays_so():
    waiting = Entry(0, 1.0, ())
    assert (waiting.withdrawn().stage, waiting.withdrawn().stopped) == (Stage.OVER, True)
    assert STARTED.withdrawn().stage is Stage.STOPPING
    over = STARTED.over("given up")
    assert over.withdrawn() == over
    assert seen(over, GONE) == over and seen(waiting, GONE) == waiting


def test_an_entry_is_read_as_it_was_written_and_a_damaged_one_is_none(tmp_path: Path):
    bundle = Bundle(("policy", "value"), {"CPU": 1.5, "GPU": 1.0}, ({"zone": "in(a, b)"},))
    entry = Entry(5, 1.5, (bundle,), Stage.PREEMPTING, "why", ("a.b=1",), failures=2, events_from=7)
    assert read(tmp_path) is None and change(tmp_path, Entry.withdrawn) is None
    assert list(tmp_path.iterdir()) == [], "a run that no service knows gets no files"
    write(tmp_path, entry)
    assert read(tmp_path) == entry
    (tmp_path / "queue.json").write_text('{"priority": 1')
    assert read(tmp_path) is None


def test_changes_that_several_make_at_once_are_all_made(tmp_path: Path):
    write(tmp_path, Entry(0, 0.0, ()))

    def grow() -> None:
        for _ in range(50):
            change(tmp_path, lambda entry: replace(entry, failures=entry.failures + 1))

    threads = [threading.Thread(target=grow) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read(tmp_path)
    assert found is not None and found.failures == 200
