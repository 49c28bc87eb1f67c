"""Runs that are started and controlled over HTTP, each a process of this machine; `tests/ray` has jobs of Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient

from orchestrator.service import jobs as jobs_module
from orchestrator.service.jobs import RayJobs
from tests.runs import SFT, merged
from tests.service_client import AUTHORIZED, client, listening, write_run
from tests.waiting import until

pytestmark = pytest.mark.timeout(600)

RECIPE: dict[str, Any] = merged(SFT, {"train": {"steps": 100_000}, "checkpoint": {"every": 1000}})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def http(runs: Path) -> Iterator[TestClient]:
    with client(runs, local=True) as http:
        try:
            yield http
        finally:
            for run in http.get("/v1/runs").json()["runs"]:
                http.post(f"/v1/runs/{run['id']}/stop", params={"now": True})


def state(http: TestClient, run: str) -> str:
    return http.get(f"/v1/runs/{run}").json()["state"]


def test_a_run_is_submitted_controlled_stopped_and_continued_over_http(http: TestClient, runs: Path):
    submitted = http.post("/v1/runs", json={"name": "one", "recipe": RECIPE})
    assert (submitted.status_code, submitted.json()["created_now"]) == (201, True)
    assert (submitted.json()["id"], submitted.json()["state"]) == ("one", "starting")
    again = http.post("/v1/runs", json={"name": "one", "recipe": RECIPE})
    assert (again.status_code, again.json()["created_now"]) == (200, False), "the same is the same run"
    other = http.post("/v1/runs", json={"name": "one", "recipe": RECIPE, "overrides": ["seed=1"]})
    assert other.status_code == 409 and "with another recipe" in other.json()["error"]["message"]
    with listening(client(runs, local=True).app) as url:
        stream = httpx.stream("GET", f"{url}/v1/runs/one/events?follow=true", headers=AUTHORIZED, timeout=300)
        with stream as answer:
            first = next(line for line in answer.iter_lines() if line.startswith("event:"))
    assert first == "event: prepared", "who follows a run that was just submitted waits for its first event"

    until(lambda: http.get("/v1/runs/one/metrics").json()["lines"], "first step")
    paused = http.patch("/v1/runs/one", json={"paused": True}).json()
    assert paused["state"] == "paused"
    written = http.post("/v1/runs/one/checkpoint").json()
    assert written["step"] == paused["step"] and written["bytes"] > 1000
    assert state(http, "one") == "paused"

    after_restart = client(runs, local=True)  # a service that knows nothing but the folder
    assert state(after_restart, "one") == "paused"
    assert after_restart.patch("/v1/runs/one", json={"paused": False}).json()["state"] == "running"
    until(lambda: after_restart.get(f"/v1/runs/one/metrics?after_step={paused['step']}").json()["lines"], "step")
    in_one = after_restart.patch("/v1/runs/one", json={"scale": {"rollout": 2}})
    assert in_one.status_code == 422 and "in one process" in in_one.json()["error"]["message"]
    elsewhere = {"attach": [{"address": "h:1", "token": "t" * 16}]}
    refused = after_restart.patch("/v1/runs/one", json=elsewhere)
    assert refused.status_code == 422 and "no engine from elsewhere" in refused.json()["error"]["message"]
    assert after_restart.post("/v1/runs/one/resume").status_code == 409, "it is running"

    assert after_restart.post("/v1/runs/one/stop").json()["state"] == "stopped"
    assert http.patch("/v1/runs/one", json={"paused": True}).status_code == 409
    last = http.get("/v1/runs/one/checkpoints").json()["checkpoints"][-1]["step"]
    resumed = http.post("/v1/runs/one/resume", json={"overrides": [f"train.steps={last + 2}"]})
    assert (resumed.status_code, resumed.json()["state"]) == (200, "starting")
    until(lambda: state(http, "one") == "finished", "end of the run")
    assert http.get("/v1/runs/one/metrics").json()["lines"][-1]["step"] == last + 2
    text = http.get("/v1/runs/one/logs?offset=0").json()["text"]
    assert "1/100000" in text and "run        " in text, "what the first process printed is there, too"
    assert http.post("/v1/runs/one/stop").json()["state"] == "finished", "to stop it again changes nothing"


def test_a_run_that_is_refused_by_its_own_process_has_failed_with_its_words(http: TestClient):
    recipe = {**RECIPE, "data": {"path": "/nowhere/at-all.jsonl"}}
    assert http.post("/v1/runs", json={"name": "refused", "recipe": recipe}).status_code == 201
    until(lambda: state(http, "refused") == "failed", "end of the run")
    assert "at-all.jsonl" in http.get("/v1/runs/refused").json()["detail"]
    listed = {run["id"]: run["state"] for run in http.get("/v1/runs").json()["runs"]}
    assert listed["refused"] == "failed"


def test_a_run_without_a_name_gets_one_and_can_be_ended_while_it_starts(http: TestClient):
    run = http.post("/v1/runs", json={"recipe": RECIPE}).json()["id"]
    assert run.startswith("t-20")
    early = http.post(f"/v1/runs/{run}/checkpoint")  # its process has not imported anything yet
    assert early.status_code == 409 and "it is starting" in early.json()["error"]["message"]
    ended = http.post(f"/v1/runs/{run}/stop").json()
    assert ended["state"] in ("failed", "stopped") and ended["step"] == 0
    assert http.get(f"/v1/runs/{run}/events").status_code == 200


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "", ".service", "x" * 200, "a b", "a\n", "/etc"])
def test_a_name_that_is_no_folder_name_is_refused(http: TestClient, runs: Path, name: str):
    before = sorted(runs.iterdir())
    assert http.post("/v1/runs", json={"name": name, "recipe": RECIPE}).status_code == 422
    assert sorted(runs.iterdir()) == before


def test_a_run_that_somebody_started_otherwise_is_not_taken_over(http: TestClient, runs: Path):
    write_run(runs, "by-hand")
    answer = http.post("/v1/runs", json={"name": "by-hand", "recipe": RECIPE})
    assert answer.status_code == 409 and "was not submitted here" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        ({"recipe": {**RECIPE, "rewards": [{"fn": "os:system"}]}}, 403, "--allow-code"),
        ({"recipe": RECIPE, "overrides": ["cluster.address=10.0.0.1:6379"]}, 422, "cluster.address"),
        ({"recipe": RECIPE, "overrides": ["train.stepz=1"]}, 422, "train.stepz"),
        ({"recipe": RECIPE, "more": 1}, 422, "more"),
        ({}, 422, "recipe"),
    ],
)
def test_what_is_refused_leaves_no_run(http: TestClient, runs: Path, body: dict[str, Any], status: int, part: str):
    before = sorted(runs.iterdir())
    answer = http.post("/v1/runs", json={"name": "no-run", **body})
    assert (answer.status_code, part in answer.json()["error"]["message"]) == (status, True), answer.text
    assert sorted(runs.iterdir()) == before


def test_overrides_of_a_resumption_are_held_to_the_same_rules(http: TestClient, runs: Path):
    write_run(runs, "rules")
    for override, status in (("rewards=[{fn: 'os:system'}]", 403), ("cluster.address=1.1.1.1:1", 422), ("x", 422)):
        assert http.post("/v1/runs/rules/resume", json={"overrides": [override]}).status_code == status, override


def test_nothing_is_left_of_a_run_whose_job_could_not_be_started(tmp_path: Path):
    http = client(tmp_path, dashboard="http://127.0.0.1:9")
    answer = http.post("/v1/runs", json={"name": "one", "recipe": RECIPE})
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "unavailable")
    assert "does not answer" in answer.json()["error"]["message"]
    assert list(tmp_path.iterdir()) == []
    assert http.get("/readyz").status_code == 503
    assert http.get("/v1/runs").status_code == 200, "what is on the disk can be read without Ray"


def test_a_folder_that_cannot_be_used_and_a_bug_are_errors_that_say_what_they_are(tmp_path: Path):
    http = client(tmp_path)
    (write_run(tmp_path, "one") / "metrics.jsonl").unlink()
    (tmp_path / "one" / "metrics.jsonl").mkdir()
    answer = http.get("/v1/runs/one/metrics")
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "unavailable")
    assert answer.json()["error"]["message"] == "the service cannot use the folder of the runs: Is a directory"
    http.app.state.runs = None
    answer = http.get("/v1/runs")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the service failed with AttributeError; its log has the traceback"


def test_the_job_of_a_run_has_its_id_and_a_run_that_goes_on_takes_the_place_of_its_ended_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Against a server that behaves as Ray's documentation says; `tests/ray/test_service.py` has Ray's own."""
    monkeypatch.setattr(jobs_module, "MONITOR_S", 0.4)
    with job_server() as (url, jobs):
        ray = RayJobs(url)
        ray.submit("one", tmp_path, ["troupe", "run", "a b.json"], stop_wait_s=45.0)
        assert jobs["one"]["entrypoint"] == "troupe run 'a b.json'"
        assert jobs["one"]["runtime_env"] == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "45"}}
        assert ray.states({"one": tmp_path, "two": tmp_path}) == {"one": "running"}
        with pytest.raises(Exception, match="has a job, which is running"):
            ray.clear("one", tmp_path)
        ray.kill("one", tmp_path)
        assert ray.states({"one": tmp_path}) == {"one": "stopped"}
        ray.clear("one", tmp_path)
        assert ray.states({"one": tmp_path}) == {}
        ray.submit("one", tmp_path, ["troupe", "resume"], stop_wait_s=1)
        assert (jobs["one"]["entrypoint"], jobs["one"]["status"]) == ("troupe resume", "RUNNING")
        assert jobs["deleted"]["seconds_after_its_end"] >= 0.4, "before that Ray would take the new job for the old one"


@contextmanager
def job_server() -> Iterator[tuple[str, dict[str, Any]]]:
    """(URL, jobs by id) of a Job API that has no agent at the first submission."""
    app, jobs, refused = FastAPI(), {}, []

    @app.post("/api/jobs/")
    async def submit(request: Request) -> Any:
        if not refused:
            refused.append(True)
            return Response("No available agent to submit job, please try again later.", 500)
        job = await request.json()
        if job["submission_id"] in jobs:
            return Response("Traceback\nValueError: Job with submission_id already exists.", 400)
        jobs[job["submission_id"]] = {**job, "status": "RUNNING"}
        return {"submission_id": job["submission_id"]}

    @app.get("/api/jobs/")
    def listed() -> Any:
        return [*jobs.values(), {"submission_id": None, "status": "SUCCEEDED", "type": "DRIVER"}]

    @app.post("/api/jobs/{job}/stop")
    def stop(job: str) -> Any:
        jobs[job] |= {"status": "STOPPED", "end_time": time.time() * 1000}
        return {"stopped": True}

    @app.get("/api/jobs/{job}")
    def one(job: str) -> Any:
        return jobs[job]

    @app.delete("/api/jobs/{job}")
    def delete(job: str) -> Any:
        jobs["deleted"] = {"seconds_after_its_end": time.time() - jobs.pop(job)["end_time"] / 1000, "status": ""}
        return {"deleted": True}

    with listening(app) as url:
        yield url, jobs
