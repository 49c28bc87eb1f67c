"""What a Ray of our own leaves behind, ended by a process that outlives the driver."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil

from orchestrator.imports import ROOT

DRIVER = """
import subprocess, sys, time
from orchestrator.leftovers import Leftovers

agent = [sys.executable, "-c", "import time; time.sleep(60)"]
named = subprocess.Popen([*agent, "--session=session_2026-01-01_00-00-00_1_2"], start_new_session=True)
other = subprocess.Popen([*agent, "--session=session_2026-01-01_00-00-00_1_3"], start_new_session=True)
leftovers = Leftovers("session_2026-01-01_00-00-00_1_2")
print(named.pid, other.pid, flush=True)
time.sleep(60)
"""


def test_after_kill_9_of_the_driver_processes_of_its_session_end_and_no_others():
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True, cwd=Path(ROOT))
    assert driver.stdout is not None
    named, other = map(psutil.Process, map(int, driver.stdout.readline().split()))
    family = psutil.Process(driver.pid).children(recursive=True)
    (watcher,) = [process for process in family if process not in (named, other)]
    driver.send_signal(signal.SIGKILL)
    driver.wait(10)
    try:
        assert not psutil.wait_procs([named, watcher], timeout=30)[1]
        assert other.is_running()
    finally:
        other.kill()
