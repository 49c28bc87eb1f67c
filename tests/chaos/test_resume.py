"""A run that loses a rank, and later its driver, by `kill -9` ends with the same bits as one that lost nothing."""

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.runs import TROUPE, Run, plain_environment

pytestmark = pytest.mark.timeout(900)  # whole runs, several processes each; a busy machine is slow to start them

STEPS = 10
# An untrained model answers nothing right. Of this reward nearly every completion has another value, so that every
# group has something to teach: bit-identity of weights that did not move would prove nothing. After as many steps as
# the file says, the run waits for the test: when it is killed depends on nobody's speed.
REWARD = """
import pathlib, time

def spread(completions, trainer_state, **columns):
    while trainer_state.global_step >= int(pathlib.Path(__file__).with_name("steps").read_text() or 0):
        time.sleep(0.02)
    return [sum(text.encode()) % 17 / 17 for text in completions]
"""
CHANGES = {
    "train": {"steps": STEPS, "batch_size": 8, "max_staleness": 0},
    "roles": {
        "rollout": {"engine": "hf", "workers": 2, "threads": 1},
        "policy": {"threads": 1},
        "reward": {"timeout_s": 600},
    },
    "options": {"num_generations": 4, "beta": 0.02},
    "checkpoint": {"every": 2, "keep": 9},
}


def started(where: Path, *arguments: str, steps: int) -> Run:
    where.mkdir(exist_ok=True)
    (where / "spread.py").write_text(REWARD)
    up_to(where, steps)
    rewards = [{"fn": f"{where / 'spread.py'}:spread"}]
    return Run(where, {**CHANGES, "rewards": rewards}, *arguments, environment={"OMP_NUM_THREADS": "1"})


def up_to(where: Path, steps: int) -> None:
    """How many steps the run does."""
    (where / "steps.new").write_text(str(steps))
    (where / "steps.new").rename(where / "steps")


def saved(run: Run, step: int) -> bool:
    return any(event["step"] == step for event in run.events("checkpoint"))


def weights(run: Run, step: int = STEPS) -> bytes:
    return (run.folder / "checkpoints" / f"step-{step:08d}" / "model" / "model.safetensors").read_bytes()


def assert_learned(run: Run) -> None:
    """Every step had a gradient, and moved the weights from one checkpoint to the next."""
    steps = [line for line in run.lines("metrics.jsonl") if "step_time" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1)), "the curve has every step once"
    assert all(line["grad_norm"] > 1e-3 and line["learning_rate"] > 0 for line in steps)
    assert len({weights(run, step) for step in (2, 4, 6, 8, 10)}) == 5


def assert_refuses_a_second_driver(run: Run, driver: psutil.Process) -> None:
    """`troupe resume` of a run that goes on: at once, and by name of the process."""
    command = [TROUPE, "resume", str(run.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=plain_environment())
    assert done.returncode == 2 and f"is driven by process {driver.pid}" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def assert_private(run: Run, family: list[psutil.Process]) -> None:
    """The run's folder, and the one that Ray's session is in, are its user's alone."""
    named = {
        part.split("=", 1)[1] for process in family for part in process.cmdline() if part.startswith("--temp-dir=")
    }
    assert [Path(folder).name for folder in named] == ["ray"]
    for folder in (run.folder, *(Path(each).parent for each in named)):
        assert folder.stat().st_mode & 0o777 == 0o700 and folder.stat().st_uid == os.getuid()


def test_a_run_with_restarts_that_loses_a_rank_and_then_its_driver_goes_on_by_itself_and_ends_with_the_same_bits(
    tmp_path: Path,
):
    """What is not interrupted is in one process, to save the start of a Ray; the bits are the same. A restart is the
    command `troupe resume`: the test of phases types it."""
    whole = started(tmp_path / "whole", "--local", steps=STEPS)
    run = started(tmp_path / "killed", "--restarts", "2", steps=3)
    run.until(lambda: run.steps() == 3 and saved(run, 2), "step 3, and the checkpoint that is written beside it")
    run.rank("policy").send_signal(signal.SIGKILL)
    up_to(run.where, 7)
    run.until(lambda: run.steps() == 7 and saved(run, 6), "step 7, after a restart, and the checkpoint beside it")
    (driver,) = psutil.Process(run.process.pid).children()
    assert_refuses_a_second_driver(run, driver)
    family = driver.children(recursive=True)
    assert_private(run, family)
    driver.send_signal(signal.SIGKILL)
    left = psutil.wait_procs([driver, *family], timeout=90)[1]
    assert not left, "no process outlives its driver, Ray's agents neither"
    up_to(run.where, STEPS)
    run.wait(400)
    whole.wait()
    resumed_from = [event["step"] for event in run.events("resumed")]
    assert resumed_from == [2, 6], "each from the last checkpoint"
    said = run.output.read_text()
    assert all(f"troupe: restart {each} of 2, from the last checkpoint of" in said for each in (1, 2))
    for each in (whole, run):
        assert_learned(each)
    assert weights(run) == weights(whole)
