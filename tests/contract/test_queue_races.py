"""What happens between two steps of the queue: an answer of Ray's that is lost, a service that is killed, a driver that
ends, a second client."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster.run_lock import LOCK, Driver
from orchestrator.config.loading import config_of
from orchestrator.queueing import entry as entries
from orchestrator.queueing.entry import Stage
from orchestrator.service.errors import Problem
from orchestrator.service.jobs import AnswerLost, JobState, ProcessJobs, RayJobs
from orchestrator.service.run_folders import RunFolders
from orchestrator.service.run_queue import RunQueue
from orchestrator.service.settings import Settings
from orchestrator.service.submissions import Submissions
from tests.contract.queue_stage import ScriptedJobs, Watched
from tests.runs import SFT
from tests.service_client import add_events, client
from tests.waiting import until

pytestmark = pytest.mark.timeout(300)

DEADLINE_S = 60.0


class JobServer(ThreadingHTTPServer):
    """A Job API of one node. `takes`: for each submission, whether the job is there once it was asked for; `answers`:
    the status of the answer, None: the connection is closed without one. The last of each is that of all later ones."""

    daemon_threads = True

    def __init__(self, takes: Sequence[bool], answers: Sequence[int | None]) -> None:
        super().__init__(("127.0.0.1", 0), _Asked)
        self.takes, self.answers = list(takes), list(answers)
        self.jobs: dict[str, str] = {}
        self.submitted = 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def submit(self, job: Any) -> int | None:
        turn = self.submitted
        self.submitted += 1
        if self.takes[min(turn, len(self.takes) - 1)]:
            self.jobs[job["submission_id"]] = "RUNNING"
        return self.answers[min(turn, len(self.answers) - 1)]

    def listed(self, path: str) -> Any:
        if path.startswith("/api/v0/nodes"):
            node = {"state": "ALIVE", "node_id": "n", "node_name": "a", "resources_total": {"CPU": 8.0}, "labels": {}}
            return {"data": {"result": {"result": [node]}}}
        if path.startswith("/api/v0"):
            return {"data": {"result": {"result": []}}}
        return [{"submission_id": run, "status": status, "job_id": None} for run, status in self.jobs.items()]


class _Asked(BaseHTTPRequestHandler):
    server: JobServer

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self._say(200, self.server.listed(self.path))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.path.endswith("/stop"):
            self.server.jobs[self.path.split("/")[-2]] = "STOPPED"
            self._say(200, {})
        elif (status := self.server.submit(json.loads(body))) is not None:
            self._say(status, {})

    def _say(self, status: int, what: Any) -> None:
        said = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)


@contextmanager
def job_server(*, takes: Sequence[bool] = (True,), answers: Sequence[int | None] = (200,)) -> Iterator[JobServer]:
    with JobServer(takes, answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(DEADLINE_S)


def test_a_submission_whose_answer_was_lost_is_a_run_that_starts_and_its_job_can_be_ended(tmp_path: Path):
    with job_server(answers=[None]) as server:
        http = client(tmp_path, dashboard=server.url)
        answer = http.post("/v1/runs", json={"name": "one", "recipe": SFT})
        assert server.jobs == {"one": "RUNNING"}
        assert (answer.status_code, answer.json()["state"]) == (201, "starting"), answer.text
        assert http.post("/v1/runs/one/stop?wait_s=60").json()["state"] == "stopped"
        assert server.jobs == {"one": "STOPPED"}
        assert server.submitted == 1


def test_a_job_that_no_answer_came_for_and_that_is_not_there_is_started_again_and_nothing_has_failed(tmp_path: Path):
    with job_server(takes=[False, True], answers=[None, 200]) as server:
        watched = Watched(tmp_path, RayJobs(server.url))
        watched.add("one")
        assert watched.queue.look() == {}
        assert (watched.entry("one").stage, server.jobs) == (Stage.STARTED, {}), "the next look decides"
        watched.queue.look()
        entry = watched.entry("one")
        assert (entry.stage, entry.failures, server.jobs) == (Stage.STARTED, 0, {"one": "RUNNING"})
        assert server.submitted == 2


def test_a_job_that_nobody_could_be_asked_for_is_told_from_one_whose_answer_was_lost(tmp_path: Path):
    with job_server(answers=[None]) as server:
        ray = RayJobs(server.url)
        with pytest.raises(Problem, match="does not answer") as lost:
            ray.submit("one", tmp_path, ["troupe"], stop_wait_s=1)
    with pytest.raises(Problem, match="does not answer: ConnectError") as unreached:
        ray.submit("one", tmp_path, ["troupe"], stop_wait_s=1)
    ray.close()
    assert (type(lost.value), type(unreached.value)) == (AnswerLost, Problem)
    assert server.submitted == 1


def test_a_job_that_is_there_although_the_answer_was_an_error_is_the_runs_process(tmp_path: Path):
    with job_server(answers=[500]) as server:
        watched = Watched(tmp_path, RayJobs(server.url))
        watched.add("one")
        assert watched.queue.look() == {}
        assert (watched.entry("one").stage, server.jobs) == (Stage.STARTED, {"one": "RUNNING"})


def test_a_start_that_meets_the_job_of_an_earlier_one_takes_it_and_reads_what_it_has_written(tmp_path: Path):
    watched = Watched(tmp_path)
    folder = watched.add("one")
    watched.queue.look()
    before = watched.entry("one")
    entries.write(folder, replace(before, stage=Stage.WAITING))  # as after an answer that said that it had failed
    add_events(folder, {"event": "prepared"}, {"event": "finished"})
    assert watched.queue.look() == {}
    assert watched.entry("one") == before and before.stage is Stage.STARTED
    assert watched.jobs.started == ["one"], "it was not started twice"
    assert watched.dies("one").failures == 0
    assert watched.summary("one").state == "finished"


def test_a_job_of_somebody_else_that_has_the_name_of_a_new_run_is_not_taken_for_its_process(tmp_path: Path):
    with job_server() as server:
        server.jobs["one"] = "RUNNING"
        answer = client(tmp_path, dashboard=server.url).post("/v1/runs", json={"name": "one", "recipe": SFT})
        assert answer.status_code == 409
        assert answer.json()["error"]["message"] == "run one has a job, which is running"
        assert list(tmp_path.iterdir()) == [] and server.submitted == 0


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


class SeenQueue(RunQueue):
    """A queue of which a test knows who wanted a look."""

    def __init__(self, root: Path, jobs: ScriptedJobs) -> None:
        super().__init__(root, jobs, Settings(root, token=None))
        self.wanted = 0

    def look(self) -> Mapping[str, Problem]:
        self.wanted += 1
        return super().look()


class Unreachable(ScriptedJobs):
    """No job can be started, which is known once `known_now` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.trying, self.known_now = threading.Event(), threading.Event()

    def submit(self, run: str, folder: Path, command: Sequence[str], *, stop_wait_s: float) -> None:
        self.trying.set()
        assert self.known_now.wait(DEADLINE_S)
        raise Problem(503, "Ray's Job API does not answer")


def test_a_run_that_a_second_client_has_submitted_too_is_not_removed_because_it_could_not_be_started_for_the_first(
    tmp_path: Path,
):
    jobs = Unreachable()
    queue, runs = SeenQueue(tmp_path, jobs), RunFolders(tmp_path)
    submissions, config = Submissions(runs, jobs, queue), config_of(SFT, [], "the recipe")
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(submissions.submit, "one", config)
        assert jobs.trying.wait(DEADLINE_S)
        second = clients.submit(submissions.submit, "one", config)
        until(lambda: queue.wanted == 2, "look that the second client wants")
        jobs.known_now.set()
        assert (first.result(DEADLINE_S), second.result(DEADLINE_S)) == (("one", True), ("one", False))
    found = runs.summary("one")
    assert found.state == "queued"
    assert found.detail is not None and "Ray's Job API does not answer" in found.detail
    with pytest.raises(Problem, match="does not answer"):
        submissions.submit("two", config)
    assert not (tmp_path / "two").exists(), "nobody else wants that one"
