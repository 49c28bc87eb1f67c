"""Signals and a run's task, in small processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from orchestrator.import_pin import ROOT
from tests.runs import as_in_a_terminal
from tests.waiting import ended, until

RUN = """
import asyncio, signal, subprocess, sys, time
from orchestrator.cluster.shutdown import Ending, Stopped

alive, hang = "alive" in sys.argv, "hang" in sys.argv
if "deaf" in sys.argv:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

async def train(ending):
    try:
        await ending.stop.before(asyncio.sleep(60))
    except Stopped:
        if "asked" in sys.argv:
            ending.asked()
        await asyncio.sleep(60 if "patient" in sys.argv or "slow" in sys.argv else 0)
        print("saved", flush=True)
        raise

async def run():
    within = 0.3 if "slow" in sys.argv else 60.0
    ending = Ending(
        lambda: alive, lambda: "continue there", lambda sent: print(sent.name, flush=True), save_within_s=within
    )
    ending.install_handlers()
    print(subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL).pid if hang else "up", flush=True)
    try:
        if "saves" in sys.argv:
            with ending.saving():
                await train(ending)
        await asyncio.sleep(0.5 if "deaf" in sys.argv else 60)
        print("done", flush=True)
    finally:
        print("ending", flush=True)
        time.sleep(60) if hang else await asyncio.sleep(0.5 if "lingers" in sys.argv else 0)
        print("in order", flush=True)
        ending.say()
        ending.say()

try:
    asyncio.run(run())
except (asyncio.CancelledError, Stopped) as error:
    sys.exit(3)
"""


@pytest.fixture
def started(request: pytest.FixtureRequest) -> subprocess.Popen[str]:
    """The run, up to its first line."""
    command = [sys.executable, "-c", RUN, *request.param]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(ROOT),
        preexec_fn=as_in_a_terminal,
    )
    request.addfinalizer(process.kill)
    return process


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("started", [["alive", "lingers"]], indirect=True)
def test_a_second_signal_does_not_interrupt_the_shutdown(started: subprocess.Popen[str]):
    assert next_line(started) == "up"
    started.send_signal(signal.SIGTERM)
    assert [next_line(started), next_line(started)] == ["SIGTERM", "ending"]
    started.send_signal(signal.SIGTERM)
    out, err = started.communicate(timeout=60)
    assert (started.returncode, out.split("\n")[0]) == (3, "in order")
    assert err == "troupe: stopped by SIGTERM: continue there\n"


@pytest.mark.parametrize("started", [["hang"]], indirect=True)
def test_if_a_clean_shutdown_is_impossible_the_process_and_its_children_are_killed(started: subprocess.Popen[str]):
    child = psutil.Process(int(next_line(started)))
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130
    assert err == "troupe: stopped by SIGINT: continue there\n"
    until(lambda: ended(child), "end of the child", timeout_s=60)


@pytest.mark.parametrize("started", [["alive", "deaf"]], indirect=True)
def test_a_process_that_ignores_ctrl_c_keeps_running(started: subprocess.Popen[str]):
    assert next_line(started) == "up"
    started.send_signal(signal.SIGINT)
    assert next_line(started) == "done"


SAVES_FIRST = "troupe: {}: ends its step and saves a checkpoint first, within checkpoint.grace_s={}; a second signal"


@pytest.mark.parametrize("started", [["alive", "saves"]], indirect=True)
@pytest.mark.parametrize("received", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_during_training_a_signal_saves_a_checkpoint_first(started: subprocess.Popen[str], received: signal.Signals):
    assert next_line(started) == "up"
    started.send_signal(received)
    out, err = started.communicate(timeout=60)
    assert (started.returncode, out.split()) == (3, [received.name, "saved", "ending", "in", "order"])
    said, last = err.splitlines()
    assert said.startswith(SAVES_FIRST.format(received.name, "60"))
    assert last == f"troupe: stopped by {received.name}: continue there"


@pytest.mark.parametrize("started", [["alive", "saves", "slow"]], indirect=True)
def test_a_checkpoint_that_exceeds_the_grace_period_is_abandoned_cleanly(started: subprocess.Popen[str]):
    assert next_line(started) == "up"
    started.send_signal(signal.SIGTERM)
    out, _ = started.communicate(timeout=60)
    assert (started.returncode, out.split()) == (3, ["SIGTERM", "ending", "in", "order"])


@pytest.mark.parametrize("started", [["alive", "saves", "patient", "lingers"]], indirect=True)
def test_a_second_signal_abandons_the_checkpoint_at_once_and_a_third_has_no_effect(started: subprocess.Popen[str]):
    assert next_line(started) == "up"
    started.send_signal(signal.SIGINT)
    assert next_line(started) == "SIGINT"
    started.send_signal(signal.SIGINT)
    assert next_line(started) == "ending"
    started.send_signal(signal.SIGINT)
    out, _ = started.communicate(timeout=60)
    assert (started.returncode, out.split()) == (3, ["in", "order"])


@pytest.mark.parametrize("started", [["alive", "saves", "asked"]], indirect=True)
def test_a_request_to_stop_does_not_hurry_what_a_signal_ends_already(started: subprocess.Popen[str]):
    assert next_line(started) == "up"
    started.send_signal(signal.SIGTERM)
    out, _ = started.communicate(timeout=60)
    assert (started.returncode, out.split()) == (3, ["SIGTERM", "saved", "ending", "in", "order"])


@pytest.mark.parametrize("started", [["saves", "lingers"]], indirect=True)
def test_if_ray_is_gone_the_shutdown_does_not_wait(started: subprocess.Popen[str]):
    assert next_line(started) == "up"
    started.send_signal(signal.SIGTERM)
    _, err = started.communicate(timeout=60)
    assert (started.returncode, err) == (143, "troupe: stopped by SIGTERM: continue there\n")


FAILED = """
import asyncio
from orchestrator.cluster.shutdown import Ending

async def run():
    ending = Ending(lambda: False, lambda: "continue there", lambda sent: None)
    ending.install_handlers()
    ending.failed("Ray's raylet (pid 7) is gone")
    await asyncio.sleep(60)

asyncio.run(run())
"""


def test_a_run_whose_ray_is_gone_ends_at_once_and_says_what_was_lost_and_where_to_continue():
    done = subprocess.run([sys.executable, "-c", FAILED], capture_output=True, text=True, timeout=30, cwd=Path(ROOT))
    assert done.returncode == 1
    assert done.stderr == "troupe: the run failed: Ray's raylet (pid 7) is gone: continue there\n"


HANGS_UP = """
import os, signal, subprocess, sys
from orchestrator.cluster.shutdown import hangups_ignored

child = [sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"]
with hangups_ignored():
    print(subprocess.check_output(child, text=True).strip())
print(signal.getsignal(signal.SIGHUP) == signal.SIG_DFL)
"""


def test_a_child_started_while_hangups_are_ignored_ignores_them_and_its_parent_stops_ignoring_them():
    done = subprocess.run([sys.executable, "-c", HANGS_UP], capture_output=True, text=True, timeout=30, cwd=Path(ROOT))
    assert done.stdout.split() == ["True", "True"], done.stderr
