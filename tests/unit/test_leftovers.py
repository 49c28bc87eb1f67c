"""What a Ray of our own leaves behind, ended by a process that outlives the driver."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil

from orchestrator.import_pin import ROOT
from tests.waiting import ended, until

DRIVER = """
import gc, os, subprocess, sys, time
from orchestrator.cluster.leftovers import Leftovers

agent = [sys.executable, "-c", "import time; time.sleep(60)"]
named = subprocess.Popen([*agent, "--session=session_2026-01-01_00-00-00_1_2"], start_new_session=True)
other = subprocess.Popen([*agent, "--session=session_2026-01-01_00-00-00_1_3"], start_new_session=True)

def titled(folder):
    "A process with a title of Ray's in the place of its command line, and a log file open in that folder."
    os.mkdir(folder)
    code = f"import time; log = open({folder + '/agent.log'!r}, 'w'); time.sleep(60)"
    process = subprocess.Popen(
        ["ray::Agent"], executable=sys.executable, stdin=subprocess.PIPE, start_new_session=True, text=True
    )
    process.stdin.write(code)
    process.stdin.close()
    while not os.path.exists(folder + "/agent.log"):
        time.sleep(0.01)
    return process

titles = [titled(f"{sys.argv[1]}/session_2026-01-01_00-00-00_1_{each}") for each in (2, 3)]
def pipes():
    return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in range(3, 20) if os.path.exists(f"/proc/self/fd/{fd}"))

leftovers = Leftovers("session_2026-01-01_00-00-00_1_2", grace_s=0.2)
before = pipes()
leftovers.itself = leftovers  # as in the traceback of an exception
del leftovers
gc.collect()
print(*(each.pid for each in (named, titles[0], other, titles[1])), int(pipes() == before != []), flush=True)
time.sleep(60)
"""


def test_after_kill_9_of_the_driver_processes_of_its_session_end_and_no_others(tmp_path: Path):
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(ROOT))
    assert driver.stdout is not None
    *pids, lives_on = map(int, driver.stdout.readline().split())
    assert lives_on, "the watcher's pipe is open although nobody holds the object"
    named, titled, *others = map(psutil.Process, pids)
    assert titled.cmdline() == ["ray::Agent"]
    family = psutil.Process(driver.pid).children(recursive=True)
    (watcher,) = [process for process in family if process not in (named, titled, *others)]
    driver.send_signal(signal.SIGKILL)
    driver.wait(10)
    try:
        until(lambda: all(map(ended, (named, titled, watcher))), "end of the session's processes", timeout_s=30)
        assert all(other.is_running() for other in others)
    finally:
        for other in others:
            other.kill()
