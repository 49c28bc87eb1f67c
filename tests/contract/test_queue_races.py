"""What happens between two steps of the queue: an answer of Ray's that is lost, a service that is killed, a driver that
ends, a second client."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from orchestrator.cluster.run_lock import LOCK, Driver
from orchestrator.queueing import entry as entries
from orchestrator.queueing.entry import Stage
from orchestrator.service.errors import Problem
from orchestrator.service.jobs import JobState, ProcessJobs
from orchestrator.service.run_queue import RunQueue
from tests.contract.queue_stage import ScriptedJobs, Watched
from tests.service_client import add_events
from tests.waiting import until

pytestmark = pytest.mark.timeout(300)


class Killed(BaseException):
    """The end of a service by `kill -9`."""


class KilledAtSubmission(ScriptedJobs):
    """With `kills` it is ended when it is about to start a job."""

    kills = True

    def submit(self, run: str, folder: Path, command: Sequence[str], *, stop_wait_s: float) -> None:
        if self.kills:
            raise Killed
        super().submit(run, folder, command, stop_wait_s=stop_wait_s)


@pytest.mark.parametrize("old", [JobState.STOPPED, JobState.ENDED])
def test_a_service_killed_before_it_started_the_next_job_leaves_no_old_one_to_be_taken_for_it(
    tmp_path: Path, old: JobState
):
    jobs = KilledAtSubmission()
    watched = Watched(tmp_path, jobs)
    folder = watched.add("one")
    entries.write(folder, replace(watched.entry("one"), resumed=True))
    jobs.known["one"] = old
    with pytest.raises(Killed):
        watched.queue.look()
    assert watched.entry("one").stage is Stage.STARTED
    jobs.kills = False
    RunQueue(tmp_path, jobs, watched.settings).look()
    entry = watched.entry("one")
    assert (entry.stage, entry.failures, jobs.started) == (Stage.STARTED, 0, ["one"])


def test_a_process_that_lives_is_not_cleared_and_of_one_that_ended_nothing_is_left(tmp_path: Path):
    jobs, folders = ProcessJobs(), {"one": tmp_path}
    jobs.submit("one", tmp_path, ["sleep", "300"], stop_wait_s=1)
    try:
        with pytest.raises(Problem, match="run one has a process") as refused:
            jobs.clear("one", tmp_path)
        assert refused.value.status == 409
    finally:
        jobs.kill("one", tmp_path)
    until(lambda: jobs.states(folders) == {"one": JobState.ENDED}, "end of the process")
    jobs.clear("one", tmp_path)
    assert jobs.states(folders) == {}
    jobs.clear("one", tmp_path)  # it never had one
    assert list(tmp_path.iterdir()) == []


class EndsBetween(ScriptedJobs):
    """The driver of the run `one`, which this process is, ends once others were asked about in a look."""

    def __init__(self, folder: Path, then: JobState) -> None:
        super().__init__()
        self.folder, self.then = folder, then
        self.asked: list[list[str]] = []

    def states(self, folders: Mapping[str, Path]) -> dict[str, JobState]:
        found = super().states(folders)
        self.asked.append(sorted(folders))
        if folders and "one" not in folders:
            (self.folder / LOCK).write_text("")
            self.known["one"] = self.then
        return found


@pytest.mark.parametrize(
    ("then", "stage"), [(JobState.RUNNING, Stage.STARTED), (JobState.STOPPED, Stage.OVER)], ids=["runs", "stopped"]
)
def test_a_run_whose_driver_ends_during_a_look_is_asked_about_in_the_next_one(
    tmp_path: Path, then: JobState, stage: Stage
):
    jobs = EndsBetween(tmp_path / "one", then)
    watched = Watched(tmp_path, jobs)
    folder = watched.add("one")
    watched.add("two")
    watched.queue.look()
    assert jobs.started == ["one", "two"]
    add_events(folder, {"event": "prepared"})
    (folder / LOCK).write_text(json.dumps(asdict(Driver.here())))
    watched.queue.look()
    assert jobs.asked[-1] == ["two"] and (folder / LOCK).read_text() == ""
    assert watched.entry("one").stage is Stage.STARTED, "nobody was asked about it"
    watched.queue.look()
    entry = watched.entry("one")
    assert jobs.asked[-1] == ["one", "two"]
    assert (entry.stage, entry.stopped, entry.failures) == (stage, stage is Stage.OVER, 0)
    assert jobs.started == ["one", "two"]
