"""A run that is killed with `kill -9` and resumed ends with the same bits as one that was never interrupted."""

import signal
from pathlib import Path

import psutil
import pytest

from tests.runs import Run

pytestmark = pytest.mark.timeout(900)  # whole runs, several processes each; a busy machine is slow to start them

CHANGES = {
    "train": {"steps": 10, "batch_size": 8, "max_staleness": 0},
    "roles": {"rollout": {"engine": "hf", "workers": 2}},
    "options": {"num_generations": 4, "beta": 0.02},
    "checkpoint": {"every": 2},
}


def weights(run: Run) -> bytes:
    return (run.folder / "checkpoints" / "step-00000010" / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    run = Run(tmp_path_factory.mktemp("whole"), CHANGES)
    run.wait()
    return weights(run)


@pytest.mark.parametrize("at_step", [3, 6])
def test_a_killed_and_resumed_run_ends_with_the_same_bits(tmp_path: Path, uninterrupted: bytes, at_step: int):
    run = Run(tmp_path, CHANGES)
    run.until(lambda: run.steps() >= at_step, f"step {at_step}")
    family = psutil.Process(run.process.pid).children(recursive=True)
    run.process.send_signal(signal.SIGKILL)
    run.process.wait(30)
    assert not psutil.wait_procs(family, timeout=30)[1], "no process outlives its driver, Ray's agents neither"
    assert run.steps() < 10, "it was over before it was killed"
    run.resume()
    run.wait()
    assert weights(run) == uninterrupted
    steps = [line["step"] for line in run.lines("metrics.jsonl") if "step_time" in line]
    assert steps == list(range(1, 11)), "the curve has every step once"


def test_a_run_that_may_restart_goes_on_by_itself_to_the_same_bits(tmp_path: Path, uninterrupted: bytes):
    run = Run(tmp_path, CHANGES, "--restarts", "2")
    run.until(lambda: run.steps() >= 3, "step 3")
    run.rank("policy").send_signal(signal.SIGKILL)
    run.wait()
    assert "troupe: restart 1 of 2, from the last checkpoint of" in run.output.read_text()
    assert weights(run) == uninterrupted
    steps = [line["step"] for line in run.lines("metrics.jsonl") if "step_time" in line]
    assert steps == list(range(1, 11)), "the curve has every step once"
