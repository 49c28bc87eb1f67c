"""Signals and a run's task, in small processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from orchestrator.import_pin import ROOT

RUN = """
import asyncio, signal, subprocess, sys, time
from orchestrator.cluster.shutdown import Ending

alive, hang = "alive" in sys.argv, "hang" in sys.argv
if "deaf" in sys.argv:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

async def run():
    ending = Ending(lambda: alive, lambda: "continue there", lambda sent: print(sent.name, flush=True))
    ending.obey_signals()
    print(subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL).pid if hang else "up", flush=True)
    try:
        await asyncio.sleep(1 if "deaf" in sys.argv else 60)
        print("done", flush=True)
    finally:
        print("ending", flush=True)
        time.sleep(60) if hang else await asyncio.sleep(0.5)
        print("in order", flush=True)
        ending.say()
        ending.say()

try:
    asyncio.run(run())
except asyncio.CancelledError:
    sys.exit(3)
"""


@pytest.fixture
def started(request: pytest.FixtureRequest) -> subprocess.Popen[str]:
    """The run, up to its first line."""
    command = [sys.executable, "-c", RUN, *request.param]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(ROOT))
    request.addfinalizer(process.kill)
    return process


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("started", [["alive"]], indirect=True)
def test_a_second_signal_does_not_interrupt_what_puts_things_in_order(started: subprocess.Popen[str]):
    assert next_line(started) == "up"
    started.send_signal(signal.SIGTERM)
    assert [next_line(started), next_line(started)] == ["SIGTERM", "ending"]
    started.send_signal(signal.SIGTERM)
    out, err = started.communicate(timeout=30)
    assert (started.returncode, out.split("\n")[0]) == (3, "in order")
    assert err == "troupe: stopped by SIGTERM: continue there\n"


@pytest.mark.parametrize("started", [["hang"]], indirect=True)
def test_where_no_order_can_be_kept_the_process_and_its_children_end_all_the_same(started: subprocess.Popen[str]):
    child = psutil.Process(int(next_line(started)))
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=30)
    assert started.returncode == 130
    assert err == "troupe: stopped by SIGINT: continue there\n"
    assert not psutil.wait_procs([child], timeout=10)[1]


@pytest.mark.parametrize("started", [["alive", "deaf"]], indirect=True)
def test_a_process_that_was_told_to_ignore_ctrl_c_goes_on(started: subprocess.Popen[str]):
    assert next_line(started) == "up"
    started.send_signal(signal.SIGINT)
    assert next_line(started) == "done"
