"""A run that is killed with `kill -9` and resumed ends with the same bits as one that was never interrupted."""

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.runs import TROUPE, Run, plain_environment

pytestmark = pytest.mark.timeout(900)  # whole runs, several processes each; a busy machine is slow to start them

# An untrained model answers nothing right. Of this reward nearly every completion has another value, so that every
# group has something to teach: bit-identity of weights that did not move would prove nothing.
REWARD = """
def spread(completions, **columns):
    return [sum(text.encode()) % 17 / 17 for text in completions]
"""
CHANGES = {
    "train": {"steps": 10, "batch_size": 8, "max_staleness": 0},
    "roles": {"rollout": {"engine": "hf", "workers": 2}},
    "options": {"num_generations": 4, "beta": 0.02},
    "checkpoint": {"every": 2, "keep": 9},
}


def started(where: Path, *arguments: str) -> Run:
    (where / "spread.py").write_text(REWARD)
    return Run(where, {**CHANGES, "rewards": [{"fn": f"{where / 'spread.py'}:spread"}]}, *arguments)


def weights(run: Run, step: int = 10) -> bytes:
    return (run.folder / "checkpoints" / f"step-{step:08d}" / "model" / "model.safetensors").read_bytes()


def assert_learned(run: Run) -> None:
    """Every step had a gradient, and moved the weights from one checkpoint to the next."""
    steps = [line for line in run.lines("metrics.jsonl") if "step_time" in line]
    assert [line["step"] for line in steps] == list(range(1, 11)), "the curve has every step once"
    assert all(line["grad_norm"] > 1e-3 and line["learning_rate"] > 0 for line in steps)
    assert len({weights(run, step) for step in (2, 4, 6, 8, 10)}) == 5


def assert_refuses_a_second_driver(run: Run) -> None:
    """`troupe resume` of a run that goes on: at once, and by name of the process."""
    command = [TROUPE, "resume", str(run.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=plain_environment())
    assert done.returncode == 2 and f"is driven by process {run.process.pid}" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def assert_private(run: Run, family: list[psutil.Process]) -> None:
    """The run's folder, and the one that Ray's session is in, are its user's alone."""
    named = {
        part.split("=", 1)[1] for process in family for part in process.cmdline() if part.startswith("--temp-dir=")
    }
    assert [Path(folder).name for folder in named] == ["ray"]
    for folder in (run.folder, *(Path(each).parent for each in named)):
        assert folder.stat().st_mode & 0o777 == 0o700 and folder.stat().st_uid == os.getuid()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    run = started(tmp_path_factory.mktemp("whole"))
    run.wait()
    assert_learned(run)
    return weights(run)


def test_a_killed_and_resumed_run_ends_with_the_same_bits(tmp_path: Path, uninterrupted: bytes):
    run = started(tmp_path)
    run.until(lambda: run.steps() >= 6, "step 6")  # the tests of restarts and of phases have other moments
    run.process.send_signal(signal.SIGSTOP)  # the ten steps take less time than the command that is refused
    assert_refuses_a_second_driver(run)
    family = psutil.Process(run.process.pid).children(recursive=True)
    assert_private(run, family)
    run.process.send_signal(signal.SIGKILL)
    run.process.wait(30)
    assert not psutil.wait_procs(family, timeout=90)[1], "no process outlives its driver, Ray's agents neither"
    assert run.steps() < 10, "it was over before it was killed"
    run.resume()
    run.wait()
    assert weights(run) == uninterrupted
    assert_learned(run)


def test_a_run_with_restarts_continues_automatically_and_ends_with_the_same_bits(tmp_path: Path, uninterrupted: bytes):
    run = started(tmp_path, "--restarts", "2")
    run.until(lambda: run.steps() >= 3, "step 3")
    run.rank("policy").send_signal(signal.SIGKILL)
    run.wait()
    assert "troupe: restart 1 of 2, from the last checkpoint of" in run.output.read_text()
    assert weights(run) == uninterrupted
    assert_learned(run)
