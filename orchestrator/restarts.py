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
from types import TracebackType

from orchestrator.import_pin import ROOT

COMMAND = (
    sys.executable,
    "-c",
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'troupe'; from orchestrator.cli import main; main()",
)
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENDED_BY = (*PASSED_ON, signal.SIGPIPE)  # the run was stopped on purpose
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
    attempt that left no checkpoint is followed by `first` again; after a signal to this process none follows, whatever
    the exit code. `folder_of`: the folder of the attempt with this pid, if it has one."""
    folder: Path | None = None
    attempt = 0
    with _Attempts() as attempts:
        while True:
            resumed = folder is not None and any(folder.glob("checkpoints/step-*"))
            command = [*resume, str(folder)] if resumed else [*first]
            if attempt:
                left = f"the last checkpoint of {folder}" if resumed else "the beginning: it left no checkpoint"
                _say(f"restart {attempt} of {restarts}, from {left}")
            pid, code = attempts.run(command)
            folder = folder if resumed else folder_of(pid) or folder
            if not may_restart(code):
                return code
            _say(f"the run ended with exit code {code}")
            if attempts.told is not None:
                _say(f"{attempts.told.name} told it to stop, so it is not started again")
            if attempts.told is not None or attempt == restarts:
                return code if code > 0 else 128 - code
            attempt += 1


def folder_of(output: Path, pid: int, others: Collection[Path]) -> Path | None:
    """The folder that the run of this process made, whose name ends with the process id; None if it came to none.
    `others` were there before: in containers process ids come again."""
    named = re.compile(rf".*-{pid}(-\d+)?")
    return next(
        (folder for folder in output.glob("*-*") if named.fullmatch(folder.name) and folder not in others), None
    )


class _Attempts:
    """The processes of a run, one after the other. In the block, signals to this process are passed on to the one that
    runs, or that is being started: such a process may have no handler of its own yet, or Ray's, with which it ends
    like one that failed. `told`: the first signal that came."""

    def __init__(self) -> None:
        self.told: signal.Signals | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []  # came while there was no process

    def __enter__(self) -> _Attempts:
        self._before = {each: signal.getsignal(each) for each in PASSED_ON}
        for each, handler in self._before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(each, lambda received, _: self._pass_on(received))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def run(self, command: Sequence[str]) -> tuple[int, int]:
        """(pid, exit code) of a process in a group of its own, so that a signal reaches it once: from here."""
        process = self._process = subprocess.Popen(command, process_group=0)
        while self._early:
            process.send_signal(self._early.pop(0))
        code = process.wait()
        self._process = None
        return process.pid, code

    def _pass_on(self, received: int) -> None:
        self.told = self.told or signal.Signals(received)
        if self._process is None:
            self._early.append(received)
        else:
            self._process.send_signal(received)


def _say(what: str) -> None:
    print(f"troupe: {what}", file=sys.stderr, flush=True)
