"""The queue of the service at work: with processes of this machine, and with jobs that a test lets live and die.
`tests/ray/test_service.py` has jobs of Ray, `tests/unit/test_queue_*.py` the decisions."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

import troupe
from orchestrator.cluster.run_lock import driver_of, driving
from orchestrator.queueing import entry as entries
from orchestrator.queueing.entry import Entry, Stage
from orchestrator.queueing.progress import Budget
from orchestrator.service.app import create_app
from orchestrator.service.jobs import JobState, Reserved
from orchestrator.service.settings import Settings
from tests.contract.queue_stage import ScriptedJobs, Watched
from tests.runs import SFT, merged
from tests.service_client import AUTHORIZED, TOKEN, add_events, client, listening
from tests.waiting import until

pytestmark = pytest.mark.timeout(600)

RECIPE: dict[str, Any] = merged(SFT, {"train": {"steps": 100_000}, "checkpoint": {"every": 5}})


class Served:
    def __init__(self, http: TestClient, runs: Path) -> None:
        self.http, self.runs = http, runs

    def submit(self, name: str, priority: int = 0, *overrides: str) -> dict[str, Any]:
        body = {"name": name, "recipe": RECIPE, "priority": priority, "overrides": list(overrides)}
        answer = self.http.post("/v1/runs", json=body)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def run(self, name: str) -> dict[str, Any]:
        return self.http.get(f"/v1/runs/{name}").json()

    def stop(self, name: str) -> dict[str, Any]:
        return self.http.post(f"/v1/runs/{name}/stop?wait_s=300").json()

    def goes_beyond(self, name: str, step: int) -> None:
        until(lambda: self.run(name)["step"] > step, f"step of {name} beyond {step}: {self.run(name)['detail']}")

    def losses(self, name: str) -> dict[int, float]:
        lines = map(json.loads, (self.runs / name / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines}

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        return [
            each["data"] for each in self.http.get(f"/v1/runs/{name}/events").json()["events"] if each["event"] == kind
        ]


def test_runs_wait_for_their_turn_make_room_go_on_to_the_bit_and_are_resumed_after_a_kill(tmp_path: Path):
    """One after the other, because each start of a run takes seconds."""
    settings: dict[str, Any] = {"local": True, "at_once": 1, "preempt": True, "budget": Budget(3, 0.01)}
    with client(tmp_path, **settings) as http:
        served = Served(http, tmp_path)
        assert served.submit("low")["state"] == "starting"
        equal = served.submit("equal")
        assert (equal["state"], equal["detail"]) == ("queued", "waits for 1 place: 0 of 1 are free (run low holds 1)")
        served.goes_beyond("low", 7)
        assert served.run("equal")["state"] == "queued", "equal priority makes no room"
        assert served.stop("equal")["state"] == "stopped"
        assert not (tmp_path / "equal" / "console.log").exists(), "it never had a process"

        high = served.submit("high", 5)  # the same recipe: it does what `low` would have done undisturbed
        assert high["state"] == "queued" and high["detail"].endswith("; low makes room")
        low = served.run("low")
        assert (low["state"], low["detail"]) == (
            "preempted",
            "saves a checkpoint and ends, to make room for run high, which has priority 5",
        )
        [held] = until(lambda: served.events("low", "paused"), "pause of the run that makes room")
        served.goes_beyond("high", held["step"] + 30)
        assert served.run("low")["state"] == "preempted"
        assert served.stop("high")["state"] == "stopped"
        [resumed] = until(lambda: served.events("low", "resumed"), "resumption of the one that made room")
        assert resumed["step"] == held["step"] > 7, "no step was lost"
        served.goes_beyond("low", held["step"] + 20)

        driver = driver_of(tmp_path / "low")
        assert driver is not None
        os.kill(driver.pid, signal.SIGKILL)
        until(lambda: len(served.events("low", "resumed")) == 2, "resumption after the kill")
        assert served.run("low")["failures"] == 1
        reached = served.events("low", "resumed")[1]["step"]
        assert reached % 5 == 0, "from its newest checkpoint"
    with client(tmp_path, **settings) as http:  # another service, which knows the folder alone
        served = Served(http, tmp_path)
        served.goes_beyond("low", reached)
        assert served.run("low")["failures"] == 1
        assert http.patch("/v1/runs/low", json={"priority": 3}).json()["priority"] == 3
        assert served.stop("low")["state"] == "stopped"
        low_losses, undisturbed = served.losses("low"), served.losses("high")
        assert list(low_losses) == list(range(1, len(low_losses) + 1)), "no step is missing"
        both = low_losses.keys() & undisturbed.keys()
        assert max(low_losses) > reached and max(both) > held["step"]
        assert {step: low_losses[step] for step in both} == {step: undisturbed[step] for step in both}
        assert len({low_losses[step] for step in both}) > len(both) / 2, "it learned something meanwhile"


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    yield Watched(tmp_path)


def saves(folder: Path, step: int) -> None:
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "MANIFEST.json").write_text("{}")


def test_runs_start_in_their_order_as_far_as_there_is_room_and_the_others_say_why_they_wait(watched: Watched):
    watched.add("second", submitted=2.0)
    watched.add("third", submitted=3.0, cpus=1.0)
    watched.add("first", priority=1, submitted=9.0)
    watched.queue.look()
    assert watched.jobs.started == ["first", "second"]
    assert watched.summary("third").detail == "waits for 1 CPU: 0 of 8 are free (run first holds 4, run second holds 4)"
    watched.runs("first")
    watched.runs("second")
    watched.dies("first", "troupe: refused: no such data")
    assert watched.jobs.started == ["first", "second", "third"]


def test_an_error_that_repeats_is_tried_three_times_and_ends_with_its_words(watched: Watched):
    folder = watched.add("one")
    watched.queue.look()
    for attempt in (1, 2):
        add_events(folder, {"event": "reserved"}, {"event": "prepared"})
        entry = watched.dies("one", "Traceback (most recent call last):", "  File ...", "ValueError: mine")
        assert (entry.failures, entry.stage) == (attempt, Stage.STARTED), "it was started again at once"
    add_events(folder, {"event": "prepared"})
    assert watched.dies("one", "troupe: the run failed: ValueError: mine").stage is Stage.OVER
    found = watched.summary("one")
    assert (found.state, found.failures) == ("failed", 3)
    assert found.detail == "given up (failures: 3 of 3): ValueError: mine"
    assert all(command[-4:-1] == ["resume", str(folder), "--log"] for _, command in watched.jobs.commands)
    watched.queue.look()
    assert len(watched.jobs.commands) == 3, "it is not started for a fourth time"


def test_a_checkpoint_between_two_failures_gives_the_budget_back(watched: Watched):
    folder = watched.add("one")
    watched.queue.look()
    for step in (5, 10, 15, 20):
        saves(folder, step)
        add_events(folder, {"event": "prepared"})
        assert watched.dies("one").failures == 1
    assert len(watched.jobs.commands) == 5


def test_a_refusal_is_final_but_a_lack_of_room_is_not(watched: Watched):
    watched.add("refused")
    watched.add("crowded")
    watched.queue.look()
    watched.dies("crowded", "troupe: refused: no room on the cluster (8 CPU on 1 node) within 30:")
    watched.dies("refused", "troupe: refused: phases.sft.data is wrong")
    assert (watched.entry("crowded").failures, watched.entry("crowded").stage) == (1, Stage.STARTED)
    assert watched.entry("refused").stage is Stage.OVER
    found = watched.summary("refused")
    assert (found.state, found.detail) == ("failed", "phases.sft.data is wrong")


def test_a_new_ray_and_a_new_service_forget_neither_the_queue_nor_the_counts(watched: Watched):
    folder = watched.add("one")
    watched.queue.look()
    add_events(folder, {"event": "prepared"})
    watched.dies("one")
    watched.add("two", cpus=8.0, submitted=1.0)
    watched.queue.look()
    assert watched.summary("two").state == "queued"
    other = Watched(watched.root)  # its Ray knows no job of the first one
    add_events(folder, {"event": "prepared"})
    other.queue.look()
    assert (other.jobs.started, other.entry("one").failures) == (["one"], 2)
    assert other.summary("two").detail.startswith("waits for 8 CPU")


def test_a_run_whose_driver_was_lost_with_its_node_is_driven_from_another_one(watched: Watched):
    folder = watched.add("one")
    watched.queue.look()
    add_events(folder, {"event": "prepared"})
    (folder / "driver.lock").write_text(json.dumps({"host": "a-node-that-is-gone", "pid": 1, "started": 1.0}))
    assert watched.summary("one").state == "starting", "nobody has said yet that the node is gone"
    assert watched.dies("one").failures == 1
    with driving(folder):
        assert len(watched.jobs.commands) == 2, "its second process is not refused for the sake of the first"


def test_a_run_that_was_ordered_and_never_began_because_ray_went_away_has_not_failed(watched: Watched):
    watched.add("one")
    watched.queue.look()
    entry = watched.dies("one", state=None)
    assert (entry.failures, entry.stage, len(watched.jobs.commands)) == (0, Stage.STARTED, 2)


def test_while_ray_does_not_answer_nothing_is_decided_and_the_queue_says_so(watched: Watched):
    folder = watched.add("one")
    watched.queue.look()
    add_events(folder, {"event": "reserved"})
    watched.add("two")
    watched.jobs.answers = False
    assert set(watched.queue.look()) == {"two"}
    assert watched.entry("one").stage is Stage.STARTED
    assert watched.summary("two").detail == "waits for Ray: Ray's Job API does not answer"
    watched.jobs.answers = True
    watched.queue.look()
    assert watched.jobs.started == ["one", "two"]


def test_an_error_with_one_run_does_not_stop_the_others(watched: Watched):
    watched.add("bad", priority=9, cpus=2.0)
    watched.jobs.broken.add("bad")
    (watched.add("damaged", priority=8, cpus=2.0) / "config.json").unlink()
    watched.add("good")
    problems = watched.queue.look()
    assert watched.jobs.started == ["good"] and set(problems) == {"bad", "damaged"}
    assert watched.summary("bad").detail == "cannot be started, and is tried again: RuntimeError: a bug"


def test_an_error_of_the_queue_itself_refuses_no_submission_and_is_what_the_run_waits_for(tmp_path: Path):
    class Broken(ScriptedJobs):
        def reserved(self) -> Reserved:
            raise KeyError("node_id")

    app = create_app(Settings(tmp_path, token=TOKEN), Broken())
    http = TestClient(app, base_url="http://127.0.0.1", headers=AUTHORIZED, raise_server_exceptions=False)
    answer = http.post("/v1/runs", json={"name": "one", "recipe": RECIPE})
    assert (answer.status_code, answer.json()["state"]) == (201, "queued")
    assert answer.json()["detail"] == "waits: the queue failed with KeyError: 'node_id'; the service's log says where"


def test_who_is_stopped_before_its_process_can_be_asked_gets_a_signal_once_and_is_not_started_again(watched: Watched):
    folder = watched.add("one")
    watched.queue.look()
    entries.change(folder, Entry.withdrawn)
    watched.queue.look()
    watched.queue.look()
    assert watched.jobs.killed == ["one"]
    assert watched.dies("one").stage is Stage.OVER
    assert watched.summary("one").state == "stopped"
    assert len(watched.jobs.commands) == 1


def test_a_job_that_ray_was_told_to_stop_is_not_resumed(watched: Watched):
    watched.add("one")
    watched.queue.look()
    assert watched.dies("one", state=JobState.STOPPED).stage is Stage.OVER
    assert watched.summary("one").state == "stopped"


def test_a_run_that_does_not_make_room_in_time_gets_a_signal(tmp_path: Path):
    watched = Watched(tmp_path, preempt=True)
    low = watched.add("low", cpus=8.0)
    watched.queue.look()
    watched.runs("low")
    watched.add("high", priority=1, cpus=8.0)
    watched.queue.look()
    assert watched.summary("low").state == "preempted" and watched.jobs.killed == []
    entries.change(low, lambda entry: Entry(**{**entry.__dict__, "asked": entry.asked - 1000}))
    watched.queue.look()
    assert watched.jobs.killed == ["low"]
    watched.dies("low")
    assert watched.entry("low").failures == 0, "it was told to go"
    assert watched.jobs.started == ["low", "high"]
    assert watched.summary("low").state == "preempted"


def test_with_an_autoscaler_runs_are_started_without_room_because_that_is_what_makes_nodes(tmp_path: Path):
    watched = Watched(tmp_path, autoscaling=True, at_once=2)
    for run in ("a", "b", "c"):
        watched.add(run, cpus=100.0)
    watched.queue.look()
    assert watched.jobs.started == ["a", "b"]
    assert watched.summary("c").detail == "waits for 1 place: 0 of 2 are free (run a holds 1, run b holds 1)"


def test_a_run_is_submitted_from_python_and_its_handle_knows_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TROUPE_TOKEN", TOKEN)
    config = troupe.load_config(write_recipe(tmp_path))
    runs = tmp_path / "runs"
    jobs = ScriptedJobs()
    with listening(create_app(Settings(runs, token=TOKEN, at_once=1), jobs)) as url:
        first = troupe.submit(config, name="first", runs=runs, url=url)
        assert (first.status().kind, jobs.started) == ("starting", ["first"])
        second = troupe.submit(config, ["seed=2"], name="second", priority=-1, runs=runs, url=url)
        found = second.status()
        assert (found.kind, found.state) == ("queued", "waits for 1 place: 0 of 1 are free (run first holds 1)")
        second.prioritise(4)
        entry = entries.read(second.folder)
        assert entry is not None and entry.priority == 4
        assert not second.over
        assert second.stop() is None
        assert second.status().kind == "stopped"
        with pytest.raises(troupe.Interrupted):
            second.result()
    assert jobs.started == ["first"]


def write_recipe(folder: Path) -> Path:
    file = folder / "recipe.json"
    file.write_text(json.dumps(RECIPE))
    return file
