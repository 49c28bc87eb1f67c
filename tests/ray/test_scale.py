"""`troupe scale RUN rollout=N` on a running job."""

import subprocess
import time

import pytest

from tests.runs import TROUPE, Run, plain_environment

pytestmark = pytest.mark.timeout(900)  # whole runs, several processes each; a busy machine is slow to start them


def serving(run: Run) -> int:
    joined = {event["worker"] for event in run.events("joined") if event["role"] == "rollout"}
    gone = {event["worker"] for event in run.events("stopped") if event["role"] == "rollout"}
    return len(joined - gone)


def ask_to_scale(run: Run, target: str) -> subprocess.CompletedProcess[str]:
    command = [TROUPE, "scale", str(run.folder), target]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=plain_environment())


def scale(run: Run, count: int) -> None:
    done = ask_to_scale(run, f"rollout={count}")
    assert done.returncode == 0, done.stderr


def test_a_running_job_is_scaled_up_and_down_new_workers_take_part_and_a_trainer_cannot_be_scaled(tmp_path):
    run = Run(tmp_path, {"train": {"steps": 400, "batch_size": 8}, "cluster": {"num_cpus": 6}})
    run.until(lambda: run.steps() >= 2, "step 2")
    refused = ask_to_scale(run, "policy=2")
    assert refused.returncode == 2
    assert "no role policy whose workers come and go" in refused.stderr and "rollout" in refused.stderr
    assert "Traceback" not in refused.stderr
    scale(run, 3)
    run.until(lambda: serving(run) == 3, "three rollout workers")
    reached = run.steps()
    run.until(lambda: run.steps() >= reached + 10, "ten more steps")
    scale(run, 1)
    run.until(lambda: serving(run) == 1, "one rollout worker")
    reached = run.steps()
    run.until(lambda: run.steps() >= reached + 3, "three more steps")
    run.process.terminate()
    run.process.wait(60)

    workers = {row["worker"] for row in run.completions()}
    assert len(workers) == 3, "every worker that joined was given prompts"
    assert not run.events("evicted"), "scaling down drains, it does not kill"


def test_a_job_scaled_to_zero_waits_reports_it_once_and_continues_when_it_is_scaled_up_again(tmp_path):
    changes = {"train": {"steps": 400, "batch_size": 8}, "roles": {"rollout": {"engine": "hf"}}}
    run = Run(tmp_path, {**changes, "cluster": {"num_cpus": 6, "watchdog_s": 1}, "weights": {"transport": "disk"}})
    run.until(lambda: run.steps() >= 2, "step 2")
    scale(run, 0)
    run.until(lambda: serving(run) == 0, "no rollout worker")
    printed = len(run.output.read_text())
    stands = run.steps()
    time.sleep(12)  # twice as long as the console needs to complain of a wait
    assert run.steps() <= stands + 1 and run.process.poll() is None
    assert "waiting" not in run.output.read_text()[printed:]
    assert run.output.read_text().count("paused=whatever needs a rollout worker") == 1
    for _ in range(2):  # a worker that comes late catches up each time
        scale(run, 1)
        reached = run.steps()
        run.until(lambda reached=reached: run.steps() >= reached + 3, "three more steps")
        scale(run, 0)
        run.until(lambda: serving(run) == 0, "no rollout worker")
    run.process.terminate()
    assert run.process.wait(60) == 143
    assert not run.events("evicted")
