"""What a run that has ended is resumed with, and from where. `test_service_control.py` resumes a run that has saved a
checkpoint, with real processes; here the jobs live and die as a test says."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

import troupe
from orchestrator.config.loading import config_of
from orchestrator.service.app import create_app
from orchestrator.service.jobs import JobState
from orchestrator.service.settings import Settings
from tests.runs import SFT, TROUPE
from tests.service_client import AUTHORIZED, TOKEN, add_events

pytestmark = pytest.mark.timeout(300)


class KnownJobs:
    """Jobs that run until a test ends them."""

    def __init__(self) -> None:
        self.commands: list[Sequence[str]] = []
        self.known: dict[str, JobState] = {}

    def clear(self, run: str, folder: Path) -> None:
        self.known.pop(run, None)

    def submit(self, run: str, folder: Path, command: Sequence[str], *, stop_wait_s: float) -> None:
        self.commands.append(command)
        self.known[run] = JobState.RUNNING

    def states(self, folders: Mapping[str, Path]) -> dict[str, JobState]:
        return {run: self.known[run] for run in folders if run in self.known}

    def reserved(self) -> None: ...

    def kill(self, run: str, folder: Path) -> None:
        self.known[run] = JobState.STOPPED

    def ready(self) -> None: ...


class Resumed:
    """A run of SFT that was submitted to a service, and started."""

    def __init__(self, runs: Path) -> None:
        self.folder, self.jobs = runs / "one", KnownJobs()
        app = create_app(Settings(runs, token=TOKEN, fresh_s=0.0), self.jobs)
        self.http = TestClient(app, base_url="http://127.0.0.1", headers=AUTHORIZED)
        assert self.http.post("/v1/runs", json={"name": "one", "recipe": SFT}).status_code == 201

    def is_accepted(self) -> None:
        config = config_of(SFT, [], "the recipe").model_dump_json()
        (self.folder / "config.json").write_text(config)
        add_events(self.folder, {"event": "prepared", "time": 1.0})

    def saves(self, step: int) -> None:
        saved = self.folder / "checkpoints" / f"step-{step:08d}"
        saved.mkdir(parents=True)
        (saved / "MANIFEST.json").write_text("{}")
        (saved / "state.json").write_text(json.dumps({"total_step": step, "phase": "sft"}))
        add_events(self.folder, {"event": "checkpoint", "time": 2.0, "step": step})

    def ends(self, *printed: str) -> None:
        with (self.folder / "console.log").open("a") as stream:
            stream.write("".join(f"{line}\n" for line in printed))
        self.jobs.known["one"] = JobState.ENDED
        self.http.patch("/v1/runs/one", json={"priority": 1})  # which looks at the queue

    def resume(self, *overrides: str) -> Any:
        return self.http.post("/v1/runs/one/resume", json={"overrides": list(overrides)})

    @property
    def overrides(self) -> list[str]:
        """Of the command that was started last."""
        return [word for word in self.jobs.commands[-1] if word.startswith("train.")]


@pytest.fixture
def run(tmp_path: Path) -> Resumed:
    return Resumed(tmp_path)


def test_an_override_with_which_a_resumption_was_refused_is_not_that_of_the_next_one(run: Resumed):
    run.is_accepted()
    run.saves(5)
    run.ends("troupe: refused: this and that")
    assert run.resume("train.batch_size=4", "train.steps=7").status_code == 200
    assert run.overrides == ["train.batch_size=4", "train.steps=7"]
    run.ends("troupe: refused: train.batch_size is too large")
    assert run.http.get("/v1/runs/one").json()["detail"] == "train.batch_size is too large"
    assert run.resume("train.steps=8").status_code == 200
    assert run.overrides == ["train.steps=8"]


def test_an_override_of_a_resumption_that_was_stopped_before_it_was_tried_is_that_of_the_next_one(run: Resumed):
    run.is_accepted()
    run.saves(5)
    run.ends("troupe: refused: this and that")
    assert run.resume("train.steps=7").status_code == 200
    assert run.http.post("/v1/runs/one/stop?wait_s=100").json()["state"] == "stopped"
    assert run.resume("train.batch_size=4").status_code == 200
    assert run.overrides == ["train.steps=7", "train.batch_size=4"]


def test_a_run_that_was_stopped_before_it_was_accepted_begins_with_what_was_submitted_and_the_overrides(run: Resumed):
    assert run.http.post("/v1/runs/one/stop?wait_s=100").json()["state"] == "stopped"
    answer = run.resume("train.steps=7").json()
    assert (answer["id"], answer["state"], answer["from_step"]) == ("one", "starting", 0)
    assert list(run.jobs.commands[-1][3:6]) == ["resume", str(run.folder), "train.steps=7"]
    assert run.resume().status_code == 409, "it is starting"


def test_a_run_that_failed_before_its_first_checkpoint_begins_again_and_one_that_saved_goes_on(run: Resumed):
    run.is_accepted()
    run.ends("troupe: refused: this and that")
    assert run.resume().json()["from_step"] == 0
    run.saves(5)
    run.ends("troupe: refused: this and that")
    assert run.resume().json()["from_step"] == 5


def test_a_run_whose_checkpoints_were_removed_is_not_begun_anew(run: Resumed):
    run.is_accepted()
    run.saves(5)
    run.ends("troupe: refused: this and that")
    (run.folder / "checkpoints").rename(run.folder / "elsewhere")
    answer = run.resume()
    assert answer.status_code == 409
    assert answer.json()["error"]["message"] == (
        "run one has saved checkpoints, and none of them is left whole to go on from"
    )


@pytest.mark.parametrize("began", [True, False])
def test_a_run_is_as_old_after_a_resumption_as_it_was(run: Resumed, began: bool):
    created = run.http.get("/v1/runs/one").json()["created"]
    if began:
        add_events(run.folder, {"event": "prepared", "time": time.time() + 1})  # it takes time to begin
    assert run.http.post("/v1/runs/one/stop?wait_s=100").json()["state"] == "stopped"
    assert run.resume().status_code == 200
    assert run.http.get("/v1/runs/one").json()["created"] == created > time.time() - 300


def test_a_resumption_cannot_move_the_run_to_another_folder(run: Resumed):
    assert run.http.post("/v1/runs/one/stop?wait_s=100").json()["state"] == "stopped"
    refused = run.resume("output=/elsewhere")
    assert refused.status_code == 422
    assert "in which folder a run lies is the service's to say" in refused.json()["error"]["message"]


def test_a_run_that_never_began_is_resumed_by_the_command_and_says_that_it_begins_again(run: Resumed):
    assert run.http.post("/v1/runs/one/stop?wait_s=100").json()["state"] == "stopped"
    command = ["resume", str(run.folder), "train.steps=2", "--local"]
    done = subprocess.run([TROUPE, *command], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "the run ended before its first checkpoint: it begins again from the start" in done.stdout + done.stderr
    found = run.http.get("/v1/runs/one").json()
    assert (found["state"], found["step"]) == ("finished", 2)
    (run.folder / "checkpoints").rename(run.folder / "elsewhere")
    done = subprocess.run([TROUPE, *command], capture_output=True, text=True, timeout=250)
    assert done.returncode == 2 and "holds no valid checkpoint" in done.stderr


def test_a_run_that_never_began_is_resumed_from_python(run: Resumed):
    assert run.http.post("/v1/runs/one/stop?wait_s=100").json()["state"] == "stopped"
    handle = troupe.resume(run.folder, local=True, train__steps=2)
    assert handle.folder == run.folder.resolve()
    assert handle.result(timeout_s=250).folder == handle.folder
    assert next(handle.events())["event"] == "begun_again" and handle.status().step == 2
