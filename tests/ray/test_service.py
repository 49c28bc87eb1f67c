"""Runs as jobs of a private Ray, over HTTP, through the commands `troupe up`, `submit` and `down`. The tests follow one
another: each finds the run as the one before left it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from orchestrator.checkpoint import verify
from orchestrator.cluster.private_temp import private_temp
from orchestrator.cluster.run_lock import driver_of
from orchestrator.reporting.grafana import dashboard
from orchestrator.service.private_ray import RAY_TOKEN, Up
from tests.runs import ARITHMETIC, TROUPE, merged, plain_environment

pytestmark = pytest.mark.timeout(900)  # a busy machine is slow to start processes

ROLES = {"policy": {"cpus": 0.5}, "rollout": {"engine": "hf", "cpus": 0.1}}
RECIPE = merged(ARITHMETIC, {"cluster": {"num_cpus": None}, "train": {"steps": 100_000}, "roles": ROLES})


@dataclass
class Service:
    runs: Path
    up: Up

    def call(self, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
        token = (self.runs / ".service" / "token").read_text()
        headers = {"Authorization": f"Bearer {token}"}
        answer = httpx.request(method, self.up.service + path, json=body, headers=headers, timeout=200)
        assert answer.status_code == status, answer.text
        return answer.json()

    def run(self, name: str = "job") -> dict[str, Any]:
        return self.call("GET", f"/v1/runs/{name}")

    def events(self, kind: str) -> list[dict[str, Any]]:
        found = self.call("GET", "/v1/runs/job/events")["events"]
        return [each["data"] for each in found if each["event"] == kind]

    def job(self) -> dict[str, Any]:
        """As Ray's own Job API has it."""
        token = (self.runs / ".service" / RAY_TOKEN).read_text()
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.get(f"{self.up.dashboard}/api/jobs/job", headers=headers, timeout=60).json()

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            if found := condition():
                return found
            time.sleep(0.2)
        console = self.runs / "job" / "console.log"
        raise AssertionError(f"no {what}: {self.run()}\n{console.read_text()[-3000:] if console.exists() else ''}")

    def serves(self, count: int) -> None:
        self.until(lambda: self.run()["workers"].get("rollout") == {"desired": count, "serving": count}, f"{count}")

    def goes_on(self) -> None:
        reached = self.run()["step"]
        self.until(lambda: self.run()["step"] > reached, "further step")


def troupe(*arguments: str) -> str:
    done = subprocess.run([TROUPE, *arguments], capture_output=True, text=True, timeout=400, env=plain_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(*arguments: str) -> str:
    done = subprocess.run([TROUPE, *arguments], capture_output=True, text=True, timeout=400, env=plain_environment())
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    runs = tmp_path_factory.mktemp("served") / "runs"
    try:
        said = troupe("up", "--runs", str(runs), "--port", "0", "--cpus", "4", "--object-store-mib", "100")
        up = Up.read(runs)
        assert up is not None and up.service in said and up.dashboard in said
        yield Service(runs, up)
    finally:
        troupe("down", "--runs", str(runs))


def test_grafana_finds_the_dashboard_where_rays_configuration_of_it_looks(service: Service):
    folder = (service.runs / ".service" / "grafana" / "dashboards").resolve()
    assert json.loads((folder / "troupe.json").read_text()) == dashboard()
    service.until(lambda: (folder / "default_grafana_dashboard.json").exists(), "dashboard of Ray's own beside it")
    found = private_temp(service.runs / ".service").glob("session_*/metrics/grafana/provisioning/dashboards/*.yml")
    assert any(str(folder) in file.read_text() for file in found)


def test_a_submitted_run_is_a_ray_job_that_is_scaled_while_it_trains(service: Service, tmp_path: Path):
    assert service.call("GET", "/readyz") == {"status": "ready"}
    recipe = tmp_path / "recipe.yaml"
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    chatty = {"model": {"chat_template": str(tmp_path / "template.jinja")}}
    recipe.write_text(yaml.safe_dump(merged(RECIPE, chatty)))
    submit = ("submit", str(recipe), "--name", "job", "--runs", str(service.runs), "--json")
    assert json.loads(troupe(*submit))["created_now"]
    assert service.run()["state"] == "starting"
    assert not json.loads(troupe(*submit))["created_now"], "the same again is the same run"
    service.until(lambda: service.run()["step"] >= 1, "first step")
    assert (service.job()["submission_id"], service.job()["status"]) == ("job", "RUNNING")
    for count in (3, 0, 2):
        service.call("PATCH", "/v1/runs/job", {"scale": {"rollout": count}})
        service.serves(count)
        if count:
            service.goes_on()
    asked = {"model": "job", "messages": [{"role": "user", "content": "12+34="}], "max_tokens": 3}
    answer = service.call("POST", "/v1/chat/completions", asked)
    assert answer["usage"]["prompt_tokens"] == 6 and 1 <= answer["usage"]["completion_tokens"] <= 3
    members = service.run()["members"]["rollout"]
    assert len({member["pid"] for member in members if member["state"] == "serving"}) == 2
    [rank] = service.run()["ranks"]["policy"]
    assert psutil.Process(rank["pid"]).is_running() and rank["pid"] not in {member.get("pid") for member in members}
    refused = service.call("PATCH", "/v1/runs/job", {"scale": {"policy": 2}}, status=422)
    assert "it can scale reward, rollout" in refused["error"]["message"]
    events = {event["event"] for event in service.call("GET", "/v1/runs/job/events")["events"]}
    assert {"started", "joined", "resized", "stopped"} <= events and "evicted" not in events


def test_a_service_that_was_killed_is_started_again_beside_its_ray_and_knows_the_run_controls_it_and_looks_after_it(
    service: Service, tmp_path: Path
):
    up = ("up", "--runs", str(service.runs), "--port", service.up.service.rpartition(":")[2], "--preempt")
    assert "run already" in refused(*up), "both live"
    psutil.Process(service.up.server.pid).send_signal(signal.SIGKILL)
    first = service.up
    service.until(lambda: not first.server.may_live, "end of the service")
    assert f"the Ray for {service.runs}, at {first.address}, lives" in refused(*up, "--cpus", "3")
    assert "Ray was there, and the runs on it go on: only the service was started" in troupe(*up)
    second = Up.read(service.runs)
    assert second is not None and second.ray == first.ray and second.server != first.server
    service.up = second

    service.goes_on()
    assert "run        " in service.call("GET", "/v1/runs/job/logs?offset=0")["text"]
    assert service.call("GET", "/v1/runs/job/metrics?name=loss")["lines"][0]["step"] == 1
    assert service.call("PATCH", "/v1/runs/job", {"paused": True})["state"] == "paused"
    saved = service.call("POST", "/v1/runs/job/checkpoint")
    assert verify(service.runs / "job" / "checkpoints" / saved["name"]) is None
    assert service.call("POST", "/v1/runs/job/stop?wait_s=120")["state"] == "stopped"
    service.until(lambda: service.job()["status"] != "RUNNING", "end of the job")
    resumed = service.call("POST", "/v1/runs/job/resume", {"overrides": ["checkpoint.every=1000"]})
    assert resumed["state"] == "starting"
    service.until(lambda: service.run()["step"] > saved["step"], "step after the resumption")
    assert (service.job()["submission_id"], service.job()["status"]) == ("job", "RUNNING")
    _a_run_that_does_not_fit_waits_and_takes_the_place_of_one_of_lower_priority(service, tmp_path)
    _a_run_whose_driver_is_killed_is_resumed_by_itself(service)


def _a_run_that_does_not_fit_waits_and_takes_the_place_of_one_of_lower_priority(service: Service, tmp_path: Path):
    recipe = tmp_path / "large.yaml"
    recipe.write_text(yaml.safe_dump(merged(RECIPE, {"roles": {"policy": {"cpus": 3.5}}, "train": {"steps": 2}})))
    large = ("submit", str(recipe), "--name", "large", "--runs", str(service.runs), "--json")
    found = json.loads(troupe(*large))
    assert (found["state"], found["detail"]) == (
        "queued",
        "waits for 3.7 CPU: 3.3 of 4 are free (run job holds 0.7)",
    )
    assert service.run()["state"] == "running"
    service.call("PATCH", "/v1/runs/large", {"priority": 5})
    assert service.run()["state"] == "preempted"
    service.until(lambda: service.run("large")["state"] == "finished", "end of the large run")
    service.until(lambda: len(service.events("resumed")) == 2, "resumption of the run that made room")
    assert service.events("resumed")[1]["step"] == service.events("paused")[-1]["step"], "no step was lost"
    service.goes_on()


def _a_run_whose_driver_is_killed_is_resumed_by_itself(service: Service):
    driver = driver_of(service.runs / "job")
    assert driver is not None
    os.kill(driver.pid, signal.SIGKILL)
    service.until(lambda: len(service.events("resumed")) == 3, "resumption after the kill")
    reached = service.events("resumed")[2]["step"]
    service.until(lambda: service.run()["step"] > reached, "step after the kill")
    assert (service.run()["failures"], service.run()["state"]) == (1, "running")
    lines = service.call("GET", "/v1/runs/job/metrics?name=loss&limit=10000")["lines"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "each step once"


def test_what_troupe_up_started_ends_with_its_runs_saved_and_leaves_no_process(service: Service):
    ray = psutil.Process(service.up.ray.pid)
    processes = [psutil.Process(service.up.server.pid), ray, *ray.children(recursive=True)]
    assert len(processes) > 3
    assert troupe("down", "--runs", str(service.runs)) == "ended\n"
    _, left = psutil.wait_procs(processes, timeout=60)
    assert left == []
    run, large = sorted(json.loads(troupe("ls", "--runs", str(service.runs), "--json")), key=lambda run: run["id"])
    assert (run["id"], run["state"], large["state"]) == ("job", "stopped", "finished")
    newest = sorted((service.runs / "job" / "checkpoints").glob("step-*"))[-1]
    assert verify(newest) is None and int(newest.name.removeprefix("step-")) == run["step"]
    assert troupe("down", "--runs", str(service.runs)).startswith("nothing runs for")
