"""What dies or hangs in a run is named in one line, with where the run can be continued."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from orchestrator.api import attach
from tests.runs import Run

pytestmark = pytest.mark.timeout(900)  # whole runs, several processes each; a busy machine is slow to start them

CHANGES = {
    "train": {"steps": 1000, "batch_size": 8},
    "roles": {"rollout": {"engine": "hf"}, "policy": {"ping_timeout_s": 12}},
    "checkpoint": {"every": 2},
}


def said(run: Run, output: str) -> list[str]:
    assert "Traceback" not in output and "ray." not in output, output[-4000:]
    return run.said()


def test_a_rank_that_hangs_is_named_and_ends_the_run_by_its_deadline(tmp_path: Path):
    run = Run(tmp_path, CHANGES)
    run.until(lambda: run.events("checkpoint"), "a checkpoint")
    family = psutil.Process(run.process.pid).children(recursive=True)
    policy = run.rank("policy")
    policy.suspend()
    code, output = run.ended(120)
    assert code == 1
    what, where = said(run, output)
    assert f"the run failed: policy rank 0 (pid {policy.pid} on node " in what
    assert attach(run.folder).status().state.startswith(f"failed: policy rank 0 (pid {policy.pid} on node ")
    assert "hangs: no answer to a ping for" in what and "roles.policy.ping_timeout_s=12" in what
    assert f"last checkpoint {run.folder}/checkpoints/step-" in where and f"troupe resume {run.folder}" in where
    assert not psutil.wait_procs(family, timeout=60)[1], "no process outlives its driver, the one that hangs neither"


@pytest.mark.parametrize("daemon", ["raylet", "gcs_server"])
def test_when_ray_dies_the_run_ends_at_once_with_a_message(tmp_path: Path, daemon: str):
    run = Run(tmp_path, CHANGES)
    run.until(lambda: run.events("checkpoint"), "a checkpoint")
    family = psutil.Process(run.process.pid).children(recursive=True)
    (victim,) = [process for process in family if process.name() == daemon]
    victim.send_signal(signal.SIGKILL)
    code, output = run.ended(55)  # less than the minute for which Ray's client would wait
    assert code == 1
    (line,) = said(run, output)
    assert f"the run failed: Ray's {daemon} (pid {victim.pid}) is gone" in line
    assert attach(run.folder).status().state.startswith(f"failed: Ray's {daemon} (pid {victim.pid}) is gone")
    assert f"troupe resume {run.folder}" in line
    assert not psutil.wait_procs(family, timeout=60)[1]


def test_a_run_whose_output_is_closed_saves_a_checkpoint_and_shuts_down(tmp_path: Path):
    run = Run(tmp_path, {**CHANGES, "checkpoint": {}}, "--local", into="head -n 25 > /dev/null")
    code, output = run.ended()
    assert code == 141
    family_gone, line = run.events("interrupted"), said(run, output)[-1]
    assert [event["signal"] for event in family_gone] == ["SIGPIPE"]
    assert f"stopped by SIGPIPE: last checkpoint {run.folder}/checkpoints/step-" in line
    assert len(run.events("checkpoint")) == 1
