"""Compares an answer with a solution in a separate process that can be killed.

    reward's thread ── (text, solution) ──► the process: limits on its CPU time and memory for each pair
                    ◄── "expected", verdict ──  or nothing: the kernel ended it

`rewards.mathematics` bounds its own work; this is the second line of defence. An answer that exceeds the limits fails
alone: the worker and the other groups are unaffected. The limit is on CPU time, not wall time, so that a busy machine
makes no answer wrong; it also interrupts a single long multiplication, which a thread could not. Waits: a thread waits
for the process until it answers, dies, or `WAIT_S` have passed, and other threads wait for that thread; the process
waits for a pair, or for the end of its input, which is closed when the worker dies.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from actors.errors import InfraFailure

CPU_LIMIT_S = 1.0  # of one pair; the usual one takes a thousandth of that
MEMORY_LIMIT_BYTES = 2**30
WAIT_S = 30.0  # for an answer: a process that gets no CPU is no wrong answer
ENVIRONMENT = "TROUPE_VERIFICATION_CPU_LIMIT_S"


class Verifier:
    """The process, started when it is needed. Threads take turns."""

    def __init__(self, cpu_limit_s: float = CPU_LIMIT_S) -> None:
        self._cpu_limit_s = cpu_limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._turn = threading.Lock()

    def accuracy(self, text: str, solution: str) -> float | None:
        """As `rewards.mathematics.accuracy`. An answer that cannot be compared within the limits is wrong; a solution
        that cannot is none. Raises InfraFailure if the process died for another reason, or does not answer."""
        with self._turn:
            process = self._running()
            deadline = time.monotonic() + WAIT_S
            try:
                _send(process, text, solution)
                if self._line(process, deadline) == b"none":
                    return None
            except _Ended as ended:
                return self._after(process, ended, None)
            try:
                return float(self._line(process, deadline))
            except _Ended as ended:
                return self._after(process, ended, 0.0)

    def close(self) -> None:
        """End the process. The next comparison starts another."""
        process, self._process, self._unread = self._process, None, b""
        if process is not None:
            process.kill()
            process.wait(timeout=WAIT_S)
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # what was not written yet
                    if pipe is not None:
                        pipe.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            root = str(Path(__file__).resolve().parent.parent)
            search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rewards.verification"],  # -P: not from the working directory
                env={**os.environ, "PYTHONPATH": search, ENVIRONMENT: str(self._cpu_limit_s)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        return self._process

    def _line(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        assert process.stdout is not None
        while b"\n" not in self._unread:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise InfraFailure(f"comparing mathematics: process {process.pid} gave no answer within {WAIT_S:g} s")
            found = os.read(process.stdout.fileno(), 4096)
            if not found:
                raise _Ended
            self._unread += found
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    def _after(self, process: subprocess.Popen[bytes], ended: _Ended, verdict: float | None) -> float | None:
        """The verdict if it was the limit that ended the process."""
        code = process.wait(timeout=WAIT_S)
        self.close()
        if code != -signal.SIGPROF:
            raise InfraFailure(f"the process that compares mathematics died (exit code {code})") from ended
        return verdict


class _Ended(Exception):
    """The process ended instead of answering."""


def _send(process: subprocess.Popen[bytes], text: str, solution: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps([text, solution]).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        raise _Ended from None


@cache
def verifier() -> Verifier:
    """The one of this process."""
    started = Verifier()
    atexit.register(started.close)
    return started


def _serve() -> None:
    """The process: one pair a line, two lines of answer. It ends with its input, or by the kernel at a limit."""
    import resource

    from rewards.mathematics import agreement, comparable

    limit_s = float(os.environ[ENVIRONMENT])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run; this process ends with its input
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        text, solution = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            expected = comparable(solution)
        except MemoryError:
            expected = None
        _say("none" if expected is None else "expected")
        if expected is not None:
            try:
                verdict = agreement(text, expected)
            except MemoryError:
                verdict = 0.0
            _say(str(verdict))
        signal.setitimer(signal.ITIMER_PROF, 0)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve()
