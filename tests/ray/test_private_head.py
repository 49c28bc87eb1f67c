"""A Ray that somebody else started, with a token: runs by its address, submitted jobs, and who asks from outside."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.api import attach
from orchestrator.checkpoint import verify
from orchestrator.import_pin import ROOT
from orchestrator.service.private_ray import end, environment_of, start_ray
from tests.runs import ARITHMETIC, TROUPE, merged

pytestmark = pytest.mark.timeout(900)  # whole runs, several processes each; a busy machine is slow to start them

BIN = Path(sys.executable).parent
OF_THE_TRAIN_TAB = "train_v2_state_actor"  # Ray's own, which stays with the cluster
REWARD = "def longer(completions, **columns):\n    return [float(len(text)) for text in completions]\n"
JUDGES = """
import time
import ray

@ray.remote(num_cpus=0)
class Length:
    def longer(self, completions, **columns):
        return [float(len(text)) for text in completions]

ray.init(namespace="judges")
actor = Length.options(name="length").remote()
ray.get(actor.__ray_ready__.remote())
print("started", flush=True)
time.sleep(3600)  # the actor ends with its job
"""
SMALL = {
    "cluster": {"num_cpus": None},
    "roles": {"policy": {"cpus": 0.5}, "rollout": {"engine": "hf", "cpus": 0.1}},
}  # Ray's size is not ours to say here


@dataclass(frozen=True)
class Head:
    """`environment` is what a user of this cluster has set."""

    address: str
    url: str
    metrics_port: int
    environment: dict[str, str]

    def get(self, path: str) -> Any:
        """An answer of the dashboard's server."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def listed(self, what: str) -> list[dict[str, Any]]:
        """All `actors`, `placement_groups` or `tasks`, as the state API has them."""
        return self.get(f"/api/v0/{what}?limit=10000")["data"]["result"]["result"]

    def alive(self) -> list[str]:
        """Actors and placement groups that are not gone."""
        actors = [actor["name"] for actor in self.listed("actors") if actor["state"] != "DEAD"]
        groups = [each["state"] for each in self.listed("placement_groups") if each["state"] != "REMOVED"]
        return [name for name in actors if name != OF_THE_TRAIN_TAB] + groups

    def train_tab(self) -> dict[str, tuple[str, int, list[str]]]:
        """Of each run there: its state, the attempts, and the states of the last one's ranks."""
        runs = self.get("/api/train/v2/runs/v1")["train_runs"]
        ranks = {run["name"]: [rank["status"] for rank in run["attempts"][-1]["workers"]] for run in runs}
        return {run["name"]: (run["status"], len(run["attempts"]), ranks[run["name"]]) for run in runs}

    def job(self, job: str) -> str:
        """How it stands."""
        return self.get(f"/api/jobs/{job}")["status"]

    def logs(self, job: str) -> str:
        return self.get(f"/api/jobs/{job}/logs")["logs"]

    def gauges(self, run: str) -> dict[str, float]:
        """Those of a run on Ray's metrics port."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        found = re.findall(rf'^ray_troupe_(\w+)\{{.*run="{run}".*\}} (\S+)$', text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    def ray_job(self, *arguments: str, cwd: Path) -> str:
        """`ray job ...`, which must succeed; what it printed. A head that is young may have no agent for jobs yet."""
        verb, *rest = arguments
        for _ in range(30):
            done = subprocess.run(
                [BIN / "ray", "job", verb, "--address", self.url, *rest],
                capture_output=True, text=True, timeout=200, cwd=cwd, env=self.environment,
            )  # fmt: skip
            if "No available agent" not in done.stdout + done.stderr:
                break
            time.sleep(1)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    home = tmp_path_factory.mktemp("head")
    environment = {**environment_of(home), "PYTHONPATH": str(ROOT)}
    ray = start_ray(home, environment, cpus=4, object_store_mib=100)
    try:
        yield Head(ray.address, ray.dashboard, ray.ports["metrics-export-port"], environment)
    finally:
        end(ray.process.pid)


def until(condition: Callable[[], Any], what: str, told: Callable[[], str] = str, timeout_s: float = 300.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"no {what} within {timeout_s:g} s\n{told()[-4000:]}")


def troupe(head: Head, *arguments: str) -> str:
    done = subprocess.run([TROUPE, *arguments], capture_output=True, text=True, timeout=300, env=head.environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def job_folder(where: Path, output: Path, changes: dict[str, Any]) -> Path:
    """What a user submits: a recipe, and a reward beside it."""
    where.mkdir()
    (where / "reward.py").write_text(REWARD)
    own = {"rewards": [{"fn": "reward.py:longer"}], "output": str(output)}
    (where / "recipe.yaml").write_text(yaml.safe_dump(merged(merged(ARITHMETIC, SMALL), {**own, **changes})))
    return where


@pytest.mark.parametrize(
    ("changed", "part"),
    [({"RAY_AUTH_MODE": ""}, "export RAY_AUTH_MODE=token"), ({"RAY_AUTH_TOKEN": "0" * 64}, "takes another token")],
)
def test_a_command_without_the_clusters_token_fails_with_an_error_about_the_token(
    head: Head, changed: dict[str, str], part: str
):
    """A process that asked Ray's own client would hear nothing of tokens, after twenty seconds of warnings."""
    environment = {**head.environment, "RAY_ADDRESS": head.address, **changed}
    done = subprocess.run(
        [TROUPE, "plan", "grpo_arithmetic"], capture_output=True, text=True, timeout=300, env=environment
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert part in done.stderr


@dataclass(frozen=True)
class Alone:
    """A job of two steps that nothing else ran beside."""

    folder: Path
    run: Path
    said: str


@pytest.fixture(scope="module")
def alone(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    where = tmp_path_factory.mktemp("alone")
    folder = job_folder(where / "job", where / "runs", {"train": {"steps": 2}})
    said = head.ray_job("submit", "--working-dir", ".", "--", "troupe", "run", "recipe.yaml", cwd=folder)
    [run] = (where / "runs").glob("t-*")
    until(lambda: not head.alive(), "end of all actors and placement groups", lambda: str(head.alive()))
    return Alone(folder, run, said)


def learned(run: Path) -> list[dict[str, Any]]:
    """What the run measured in its first two steps, without times."""
    names = ("step", "loss", "reward", "grad_norm", "completions/mean_length")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in names} for line in lines if line["step"] <= 2]


def test_a_submitted_job_trains_on_the_cluster_of_ray_address_with_a_reward_of_its_own_folder_and_succeeds(
    head: Head, alone: Alone
):
    run, said = alone.run, alone.said
    assert "succeeded" in said
    assert (run / "checkpoints" / "step-00000002" / "model" / "model.safetensors").exists()
    assert json.loads((run / "run.json").read_text())["address"].split(":")[1] == head.address.split(":")[1]
    assert f"run        {run}" in said and f"dashboard  {head.url}" in said
    assert troupe(head, "status", str(run)).startswith(f"{run.name}: finished")


def test_jobs_at_once_give_what_one_gives_alone_with_a_reward_actor_that_another_job_has_started(
    head: Head, alone: Alone, tmp_path: Path
):
    """Three jobs: one has the actor, which pays what the function pays; one has the actor as its reward and is scaled,
    and inspected, and stopped; one is that which ran alone, again."""
    code = tmp_path / "judges"
    code.mkdir()
    (code / "judges.py").write_text(JUDGES)
    head.ray_job("submit", "--no-wait", "--submission-id", "judges", "--working-dir", ".", "--", "python", "judges.py",
                 cwd=code)  # fmt: skip
    until(lambda: "started" in head.logs("judges"), "actor of the other job", lambda: head.logs("judges"))
    judged = [{"actor": "ray://judges/length", "method": "longer", "name": "longer"}]
    changes = {
        "train": {"steps": 10_000},
        "checkpoint": {"every": 1_000_000},  # so that its only checkpoint is the one that its end writes
        "rewards": judged,
        "logging": {"ray_train_tab": True},
    }
    folder = job_folder(tmp_path / "job", tmp_path / "runs", changes)
    patient = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
    arguments = ("--no-wait", "--submission-id", "stopped", "--runtime-env-json", patient, "--working-dir", ".")
    head.ray_job("submit", *arguments, "--", "troupe", "run", "recipe.yaml", cwd=folder)
    again = ("submit", "--working-dir", ".", "--", "troupe", "run", "recipe.yaml")
    assert "succeeded" in head.ray_job(*again, cwd=alone.folder)

    def said() -> str:
        return head.logs("stopped")

    [run] = until(lambda: list((tmp_path / "runs").glob("t-*")), "the other run", said)
    until(lambda: attach(run).status().step > 2, "third step", said)
    [beside] = set(alone.run.parent.glob("t-*")) - {alone.run}
    assert learned(run) == learned(beside) == learned(alone.run)
    assert [line["step"] for line in learned(run)] == [1, 2] and learned(run)[0] != learned(run)[1]
    weights = "checkpoints/step-00000002/model/model.safetensors"
    assert (beside / weights).read_bytes() == (alone.run / weights).read_bytes()

    for count in (3, 0, 2):
        assert f"asked for {count} rollout worker(s)" in troupe(head, "scale", str(run), f"rollout={count}")
        wanted = {"desired": count, "serving": count}
        until(lambda wanted=wanted: attach(run).status().workers["rollout"] == wanted, f"{count} workers", said)
    assert "rollout: 2 of 2 worker(s) serve" in troupe(head, "status", str(run))
    shown = {"step", "reward", "loss", "grad_norm", "step_time"}
    until(lambda: shown <= {name for name, value in head.gauges(run.name).items() if name != "step" or value >= 5},
          "gauges on Ray's metrics port", lambda: str(head.gauges(run.name)))  # fmt: skip

    def tasks() -> set[str]:
        return {task["name"] for task in head.listed("tasks")}

    generate = r"rollout\.generate \S+\d+( and \d+ more)?"
    for kind in (r"policy\.update step \d+", r"rollout\.receive v\d+", generate, r"publish v\d+"):
        until(lambda kind=kind: any(re.fullmatch(kind, name) for name in tasks()), kind, lambda: str(sorted(tasks())))

    assert head.train_tab() == {run.name: ("RUNNING", 1, ["ALIVE"])}

    head.ray_job("stop", "stopped", cwd=folder)
    until(lambda: head.job("stopped") == "STOPPED", "end of the job", said)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["signal"] for event in events if event["event"] == "interrupted"] == ["SIGTERM"]
    assert f"continue with `troupe resume {run}`" in said()
    [saved] = run.glob("checkpoints/step-*")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert verify(saved) is None and int(saved.name.removeprefix("step-")) == last > 2
    assert head.train_tab() == {run.name: ("ABORTED", 1, ["DEAD"])}
    head.ray_job("stop", "judges", cwd=code)
    until(lambda: not head.alive(), "end of all actors and placement groups", lambda: str(head.alive()))
