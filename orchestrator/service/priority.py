"""The priority of the service's process: what it answers must not slow the runs down that train on the same cores.

A nice value alone does nothing here. Where Linux groups processes by session (`kernel.sched_autogroup_enabled`, the
default of most distributions), cores are shared between the sessions first, each of which has a nice value of its own,
and nice values of processes count within a session only. The service and each run are sessions of their own.
"""

from __future__ import annotations

import contextlib
import errno
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
