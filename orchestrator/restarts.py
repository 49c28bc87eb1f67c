"""Restarts a run from its last checkpoint after a failure of a rank, of Ray, or of its own process.

    troupe run --restarts N ──► troupe run ──── it failed ──► troupe resume RUN ──── it failed ──► ... up to N times
       (no Ray in here)     └── signals are passed on; a run that was told to stop is not started again

Each attempt is a new process, because a process cannot recover from the state that a dead Ray leaves in it.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from orchestrator.import_pin import ROOT

COMMAND = (
    sys.executable,
    "-c",
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'troupe'; from orchestrator.cli import main; main()",
)
ENDED_BY = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)  # the run was stopped on purpose
REFUSED = 2  # exit code: another attempt would be refused as well


def may_restart(exit_code: int) -> bool:
    """Whether an attempt that ended so may be followed by another. Negative: the signal that ended it."""
    wanted = {0, REFUSED, *(128 + each for each in ENDED_BY), *(-each for each in ENDED_BY)}
    return exit_code not in wanted


def supervise_run(output: Path, first: Sequence[str], resume: Sequence[str], restarts: int) -> int:
    """`troupe run` with the arguments `first`, whose folder will be below `output`, and `troupe resume` with `resume`,
    as often as needed and allowed; the exit code."""
    others = set(output.glob("*"))
    return supervise(
        [*COMMAND, "run", *first], [*COMMAND, "resume", *resume], lambda pid: folder_of(output, pid, others), restarts
    )


def supervise(
    first: Sequence[str], resume: Sequence[str], folder_of: Callable[[int], Path | None], restarts: int
) -> int:
    """Run `first`, and after a failure `resume` with the run's folder, up to `restarts` times; the last exit code. An
    attempt that left no checkpoint is followed by `first` again. `folder_of`: the folder of the attempt with this pid,
    if it has one."""
    folder: Path | None = None
    attempt = 0
    while True:
        resumed = folder is not None and any(folder.glob("checkpoints/step-*"))
        command = [*resume, str(folder)] if resumed else [*first]
        if attempt:
            where = f"from the last checkpoint of {folder}" if resumed else "from the beginning: it left no checkpoint"
            _say(f"restart {attempt} of {restarts}, {where}")
        pid, code = _attempt(command)
        folder = folder if resumed else folder_of(pid) or folder
        if not may_restart(code):
            return code
        _say(f"the run ended with exit code {code}")
        if attempt == restarts:
            return code if code > 0 else 128 - code
        attempt += 1


def folder_of(output: Path, pid: int, others: Collection[Path]) -> Path | None:
    """The folder that the run of this process made, whose name ends with the process id; None if it came to none.
    `others` were there before: in containers process ids come again."""
    named = re.compile(rf".*-{pid}(-\d+)?")
    return next(
        (folder for folder in output.glob("*-*") if named.fullmatch(folder.name) and folder not in others), None
    )


def _attempt(command: Sequence[str]) -> tuple[int, int]:
    """(pid, exit code) of a process in a group of its own, so that a signal reaches it once: from here."""
    process = subprocess.Popen(command, process_group=0)
    before = {each: signal.getsignal(each) for each in ENDED_BY}
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if before[each] is not signal.SIG_IGN:
            signal.signal(each, lambda received, _: process.send_signal(received))
    try:
        return process.pid, process.wait()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _say(what: str) -> None:
    print(f"troupe: {what}", file=sys.stderr, flush=True)
