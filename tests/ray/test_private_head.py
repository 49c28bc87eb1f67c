"""A Ray that somebody else started, with a token: runs by its address, submitted jobs, and who asks from outside."""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.import_pin import ROOT
from tests.runs import ARITHMETIC, TROUPE, end_with_the_tests, merged

pytestmark = pytest.mark.timeout(900)  # whole runs, several processes each; a busy machine is slow to start them

BIN = Path(sys.executable).parent
REWARD = "def longer(completions, **columns):\n    return [float(len(text)) for text in completions]\n"
SMALL = {"cluster": {"num_cpus": None}, "roles": {"rollout": {"engine": "hf"}}}  # Ray's size is not ours to say here


@dataclass(frozen=True)
class Head:
    """`environment` is what a user of this cluster has set."""

    address: str
    url: str
    metrics_port: int
    environment: dict[str, str]
    process: subprocess.Popen[bytes]

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
        return actors + [each["state"] for each in self.listed("placement_groups") if each["state"] != "REMOVED"]

    def gauges(self) -> dict[str, float]:
        """Those of Troupe on Ray's metrics port."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as answer:
            found = re.findall(r'^ray_troupe_(\w+)\{.*run="t-[^"]*".*\} (\S+)$', answer.read().decode(), re.MULTILINE)
        return {name: float(value) for name, value in found}

    def ray_job(self, *arguments: str, cwd: Path) -> str:
        """`ray job ...`, which must succeed; what it printed. A head that is young may have no agent for jobs yet."""
        verb, *rest = arguments
        for _ in range(30):
            done = subprocess.run(
                [BIN / "ray", "job", verb, "--address", self.url, *rest],
                capture_output=True, text=True, timeout=200, cwd=cwd, env={**os.environ, **self.environment},
            )  # fmt: skip
            if "No available agent" not in done.stdout + done.stderr:
                break
            time.sleep(1)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


def free_ports(count: int) -> Iterator[int]:
    """Of those below the ones that a system gives away: nobody is given one between this probe and Ray's start."""
    for port in random.sample(range(20_000, 32_000), 1000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            count -= 1
            yield port
        if not count:
            return


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    home = tmp_path_factory.mktemp("head")
    token = home / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    sockets = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # their paths may have some hundred characters only
    gcs, dashboard, agent, agent_grpc, runtime_env, metrics, client = free_ports(7)
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # `troupe` in a job's command line
        "PYTHONPATH": str(ROOT),
    }
    command = [
        BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}", f"--runtime-env-agent-port={runtime_env}",
        f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}", f"--temp-dir={sockets}",
        "--num-cpus=4", f"--object-store-memory={100 * 2**20}", "--disable-usage-stats",
    ]  # fmt: skip
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    own = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    with (home / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command,
            env={**inherited, **environment, **own},
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=end_with_the_tests,
        )
    started = Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", metrics, environment, process)
    try:
        until(lambda: answers(started), "the head's answer", lambda: (home / "log.txt").read_text())
        yield started
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            shutil.rmtree(sockets, ignore_errors=True)


def answers(head: Head) -> bool:
    assert head.process.poll() is None, "the head ended"
    try:
        return bool(head.get("/api/version"))
    except (urllib.error.URLError, OSError):
        return False


def until(condition: Callable[[], Any], what: str, told: Callable[[], str] = str, timeout_s: float = 300.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"no {what} within {timeout_s:g} s\n{told()[-4000:]}")


def troupe(head: Head, *arguments: str) -> str:
    done = subprocess.run(
        [TROUPE, *arguments], capture_output=True, text=True, timeout=300, env={**os.environ, **head.environment}
    )
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
    environment = {**os.environ, **head.environment, "RAY_ADDRESS": head.address, **changed}
    done = subprocess.run(
        [TROUPE, "plan", "grpo_arithmetic"], capture_output=True, text=True, timeout=300, env=environment
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert part in done.stderr


def test_a_submitted_job_trains_on_the_cluster_of_ray_address_with_a_reward_of_its_own_folder_and_succeeds(
    head: Head, tmp_path: Path
):
    folder = job_folder(tmp_path / "job", tmp_path / "runs", {"train": {"steps": 2, "batch_size": 8}})
    said = head.ray_job("submit", "--working-dir", ".", "--", "troupe", "run", "recipe.yaml", cwd=folder)
    assert "succeeded" in said
    [run] = (tmp_path / "runs").glob("t-*")
    assert (run / "checkpoints" / "step-00000002" / "model" / "model.safetensors").exists()
    assert json.loads((run / "run.json").read_text())["address"].split(":")[1] == head.address.split(":")[1]
    assert f"run        {run}" in said and f"dashboard  {head.url}" in said
    until(lambda: not head.alive(), "end of all actors and placement groups", lambda: str(head.alive()))
    assert troupe(head, "status", str(run)).startswith(f"{run.name}: finished")


def test_a_job_is_inspected_and_scaled_from_outside_and_shuts_down_cleanly(head: Head, tmp_path: Path):
    changes = {"train": {"steps": 10_000, "batch_size": 8}, "checkpoint": {"every": 5}}
    folder = job_folder(tmp_path / "job", tmp_path / "runs", changes)
    patient = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
    arguments = ("--no-wait", "--submission-id", "stopped", "--runtime-env-json", patient, "--working-dir", ".")
    head.ray_job("submit", *arguments, "--", "troupe", "run", "recipe.yaml", cwd=folder)

    def said() -> str:
        return head.ray_job("logs", "stopped", cwd=folder)

    [checkpoint] = until(lambda: list((tmp_path / "runs").glob("t-*/checkpoints/step-00000005")), "a checkpoint", said)
    run = checkpoint.parents[1]
    assert "asked for 2 rollout worker(s)" in troupe(head, "scale", str(run), "rollout=2")
    joined = '"event": "joined", "role": "rollout", "worker": 1'
    until(lambda: joined in (run / "events.jsonl").read_text(), "second rollout worker", said)
    until(lambda: '"serving": 2' in troupe(head, "status", str(run)), "a status with both workers", said)
    shown = {"step", "reward", "loss", "grad_norm", "step_time"}
    until(lambda: shown <= set(head.gauges()) and head.gauges()["step"] >= 5, "gauges on Ray's metrics port", said)

    def tasks() -> set[str]:
        return {task["name"] for task in head.listed("tasks")}

    generate = r"rollout\.generate \S+\d+( and \d+ more)?"
    for kind in (r"policy\.update step \d+", r"rollout\.receive v\d+", generate, r"publish v\d+"):
        until(lambda kind=kind: any(re.fullmatch(kind, name) for name in tasks()), kind, lambda: str(sorted(tasks())))

    head.ray_job("stop", "stopped", cwd=folder)
    until(lambda: "was stopped" in head.ray_job("status", "stopped", cwd=folder), "end of the job", said)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["signal"] for event in events if event["event"] == "interrupted"] == ["SIGTERM"]
    assert f"continue with `troupe resume {run}`" in said()
    until(lambda: not head.alive(), "end of all actors and placement groups", lambda: str(head.alive()))
