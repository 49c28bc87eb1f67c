"""The priority of the service's process: what it answers must not slow the runs down that train on the same cores.

A nice value alone does nothing here. Where Linux groups processes by session (`kernel.sched_autogroup_enabled`, the
default of most distributions), cores are shared between the sessions first, each of which has a nice value of its own,
and nice values of processes count within a session only. The service and each run are sessions of their own.

A small share is not enough. Two threads of a trainer wait for each other after every product, so each answer for which
the service takes a core that one of them wants holds up both. So its threads have the policy for idle time as well:
they preempt nobody when they wake, and threads of others that wake take a core on which only such a thread runs.
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
    """All threads of a process, and those that it will start. Once it has started: where the kernel does not group
    processes by session, such a thread gets almost nothing of a core that is wanted by a process that is not nice at
    all. Ray's workers are."""
    if sys.platform == "linux":
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))
