"""A run that is told to stop stops, in order, and says how to go on."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.runs import Run

pytestmark = pytest.mark.timeout(900)  # whole runs, several processes each; a busy machine is slow to start them

CHANGES = {
    "train": {"steps": 1000, "batch_size": 8},
    "roles": {"rollout": {"engine": "hf"}},
    "checkpoint": {"grace_s": 40},
}


class Foreground(Run):
    """A run in a process group of its own, as a shell starts it: Ctrl-C goes to all of the group."""

    in_foreground = True


def end(run: Foreground, send: Callable[[], None]) -> tuple[int, list[str]]:
    """(exit code, Troupe's own lines) of a run that was told to stop; nothing of it is left."""
    family = psutil.Process(run.process.pid).children(recursive=True)
    send()
    code = run.process.wait(55)  # less than the minute for which Ray's client would wait
    output = run.output.read_text()
    assert not psutil.wait_procs(family, timeout=60)[1]
    assert "Traceback" not in output, output[-4000:]
    return code, run.said()


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Foreground]:
    started = Foreground(tmp_path, CHANGES, *getattr(request, "param", ()))
    yield started
    started.process.kill()


ON_RAY: tuple[str, ...] = ()


@pytest.mark.parametrize(  # SIGTERM to a driver on Ray alone is what a job and a handle are stopped with, in tests/ray
    ("run", "received", "to_all"),
    [(ON_RAY, signal.SIGINT, True), (ON_RAY, signal.SIGHUP, True), (("--local",), signal.SIGTERM, False)],
    indirect=["run"],
)
def test_a_signal_ends_a_run_with_a_checkpoint_of_its_last_step_from_which_it_can_be_resumed(
    run: Foreground, received: signal.Signals, to_all: bool
):
    run.until(lambda: run.steps() >= 3, "step 3")
    assert not run.events("checkpoint")
    code, (first, last) = end(run, lambda: (os.killpg if to_all else os.kill)(run.process.pid, received))
    assert code == 128 + received
    [saved] = run.events("checkpoint")
    assert saved["step"] == run.steps()
    assert first.startswith(f"troupe: {received.name}: ends its step and saves a checkpoint first")
    assert f"stopped by {received.name}: last checkpoint {run.folder}/checkpoints/step-{saved['step']:08d};" in last
    assert f"troupe resume {run.folder}" in last


def test_sigterm_to_the_whole_process_group_also_ends_ray_and_the_run_ends_at_once(run: Foreground):
    run.until(lambda: run.steps() >= 3, "step 3")
    code, said = end(run, lambda: os.killpg(run.process.pid, signal.SIGTERM))
    assert code == 128 + signal.SIGTERM
    assert [event["signal"] for event in run.events("interrupted")] == ["SIGTERM"]
    saved = sorted((run.folder / "checkpoints").glob("step-*"))  # one if the driver was quicker than Ray's end
    stands = f"last checkpoint {saved[-1]};" if saved else "no checkpoint yet;"
    assert said[-1].startswith(f"troupe: stopped by SIGTERM: {stands}")
