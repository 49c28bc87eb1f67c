"""A run that is told to stop stops, in order, and says how to go on."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.runs import Run

pytestmark = pytest.mark.timeout(900)  # whole runs, several processes each; a busy machine is slow to start them

CHANGES = {
    "train": {"steps": 1000, "batch_size": 8},
    "roles": {"rollout": {"engine": "hf"}},
    "checkpoint": {"every": 2},
}


class Foreground(Run):
    """A run in a process group of its own, as a shell starts it: Ctrl-C goes to all of the group."""

    in_foreground = True


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Foreground]:
    started = Foreground(tmp_path, CHANGES)
    yield started
    started.process.kill()


@pytest.mark.parametrize("received", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_process_group_ends_a_run_and_says_where_it_can_be_continued(
    run: Foreground, received: signal.Signals
):
    run.until(lambda: run.events("checkpoint"), "a checkpoint")
    family = psutil.Process(run.process.pid).children(recursive=True)
    os.killpg(run.process.pid, received)
    code = run.process.wait(40)  # less than the minute for which Ray's client would wait
    output = run.output.read_text()
    assert code == 128 + received, output[-4000:]
    assert not psutil.wait_procs(family, timeout=20)[1]
    assert [event["signal"] for event in run.events("interrupted")] == [received.name]
    assert "Traceback" not in output
    [said] = [line for line in output.splitlines() if line.startswith("troupe: ")]
    assert f"stopped by {received.name}: last checkpoint {run.folder}/checkpoints/step-" in said
    assert f"troupe resume {run.folder}" in said
