"""Ends all processes of a Ray of our own when the driver that started it is gone, however it ended.

driver ── pipe ──► a small process in a session of its own: sleeps until the pipe closes, which is when the driver
                   is gone, `kill -9` included; then ends what still runs in Ray's session, first of all its agents,
                   which would take a minute to notice

Most of them name the session in their command lines. Those that Ray has given a title (`ray::RuntimeEnvAgent`) have no
command line any more, but files open in the session's folder.
"""

from __future__ import annotations

import subprocess
import sys

WATCHER = """
import os, signal, sys, time

def of_session(process):
    with open(f"{process}/cmdline") as stream:
        command = stream.read()
    if not command.startswith("ray::"):
        return sys.argv[1] in command
    return any(sys.argv[1] in os.readlink(f"{process}/fd/{each}") for each in os.listdir(f"{process}/fd"))

def left():
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                if of_session(f"/proc/{entry}"):
                    yield int(entry)
            except (OSError, UnicodeError):
                pass

sys.stdin.buffer.read()
began = time.monotonic()
while (found := list(left())) and time.monotonic() - began < 60:
    if time.monotonic() - began > float(sys.argv[2]):  # what ends by itself has ended
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
    time.sleep(0.2)
"""
GRACE_S = 3.0
_watchers: set[subprocess.Popen[bytes]] = set()  # else the pipe would close when a `Leftovers` is garbage


def watchers() -> set[int]:
    """The process ids of those that outlive this process, to end what it leaves behind."""
    return {watcher.pid for watcher in _watchers}


class Leftovers:
    """From now on, processes of Ray's `session` end soon after this process does: by themselves, or killed `grace_s`
    later."""

    def __init__(self, session: str, *, grace_s: float = GRACE_S) -> None:
        command = [sys.executable, "-I", "-S", "-c", WATCHER, session, str(grace_s)]
        self._watcher = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        _watchers.add(self._watcher)

    def end(self) -> None:
        """This process goes on, but that Ray was shut down: end what is left of it now. Returns at once."""
        assert self._watcher.stdin is not None
        self._watcher.stdin.close()
        _watchers.discard(self._watcher)
