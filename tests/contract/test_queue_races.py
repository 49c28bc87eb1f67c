"""What happens between two steps of the queue: an answer of Ray's that is lost, a service that is killed, a driver that
ends, a second client."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pytest

from orchestrator.cluster.run_lock import LOCK, Driver
from orchestrator.queueing.entry import Stage
from orchestrator.service.jobs import JobState
from tests.contract.queue_stage import ScriptedJobs, Watched
from tests.service_client import add_events

pytestmark = pytest.mark.timeout(300)


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
