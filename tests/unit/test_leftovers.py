"""What a Ray of our own leaves behind, ended by a process that outlives the driver."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil

from orchestrator.import_pin import ROOT

DRIVER = """
import gc, os, subprocess, sys, time
from orchestrator.cluster.leftovers import Leftovers

agent = [sys.executable, "-c", "import time; time.sleep(60)"]
named = subprocess.Popen([*agent, "--session=session_2026-01-01_00-00-00_1_2"], start_new_session=True)
other = subprocess.Popen([*agent, "--session=session_2026-01-01_00-00-00_1_3"], start_new_session=True)
def pipes():
    return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in range(3, 20) if os.path.exists(f"/proc/self/fd/{fd}"))

leftovers = Leftovers("session_2026-01-01_00-00-00_1_2")
before = pipes()
leftovers.itself = leftovers  # as in the traceback of an exception
del leftovers
gc.collect()
print(named.pid, other.pid, int(pipes() == before != []), flush=True)
time.sleep(60)
"""


def test_after_kill_9_of_the_driver_processes_of_its_session_end_and_no_others():
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True, cwd=Path(ROOT))
    assert driver.stdout is not None
    *pids, lives_on = map(int, driver.stdout.readline().split())
    assert lives_on, "the watcher's pipe is open although nobody holds the object"
    named, other = map(psutil.Process, pids)
    family = psutil.Process(driver.pid).children(recursive=True)
    (watcher,) = [process for process in family if process not in (named, other)]
    driver.send_signal(signal.SIGKILL)
    driver.wait(10)
    try:
        assert not psutil.wait_procs([named, watcher], timeout=30)[1]
        assert other.is_running()
    finally:
        other.kill()
