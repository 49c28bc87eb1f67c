"""The priority of the service's process: what it answers must not slow the runs down that train on the same cores.

A nice value alone does nothing here. Where Linux groups processes by session (`kernel.sched_autogroup_enabled`, the
default of most distributions), cores are shared between the sessions first, each of which has a nice value of its own,
and nice values of processes count within a session only. The service and each run are sessions of their own.

A small share is not enough. Two threads of a trainer wait for each other after every product, so each answer for which
the service takes a core that one of them wants holds up both. So its threads have the policy for idle time as well:
they never preempt other threads when they wake, and a thread of others that wakes counts a core on which only such
threads run as idle.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from pathlib import Path

import psutil

NICENESS = 15  # a core that is wanted by both: 3 % for the service; a core that nobody wants: all of it
ATTEMPTS, PAUSE_S = 5, 0.2  # the kernel takes one such value every 0.1 s from all users who are not root


def yield_to_runs(leader: int) -> None:
    """Of the session that process `leader` was started for. Where the kernel has no such groups, its nice value is what
    counts, and it has that, too."""
    psutil.Process(leader).nice(NICENESS)
    for _ in range(ATTEMPTS):
        try:
            with contextlib.suppress(FileNotFoundError):
                Path(f"/proc/{leader}/autogroup").write_text(str(NICENESS))
            return
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
            time.sleep(PAUSE_S)


def preempt_nobody(pid: int) -> None:
    """All threads of a process, and all threads and processes that these start. Call it once the process answers:
    where the kernel does not group processes by session, such a thread gets almost nothing of a core that a process
    without a nice value wants. (Ray's workers run with nice 15.)"""
    if sys.platform == "linux":
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended, or this system has no such policy
                os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))
