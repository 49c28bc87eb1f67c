"""What a process prints goes to a file, too, whatever prints it: Python, a library, a traceback at the end.

    this process ── fd 1, 2 ──► pipe ──► tee ──► where it went before
                                           └──► console.log

A process of its own, because it must outlive this one by what is in the pipe. It ignores the signals that end a run:
who stops a job sends them to all of its processes, and a run whose output nobody reads any more would be ended by that.
It ends when the last process that holds the pipe does.
"""

from __future__ import annotations

import io
import os
import platform
import signal
import sys
from pathlib import Path
from typing import TextIO

from actors.errors import ConfigError

CONSOLE_FILE = "console.log"  # in a run's folder

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def copy_output(file: Path) -> None:
    """From now on, to the end of `file`. To be called before threads are started, because it forks. Raises ConfigError
    if the file cannot be written: the machine of a job may not have the folder of the service that submitted it."""
    if not file.parent.is_dir():
        raise ConfigError(
            f"--log {file}: there is no folder {file.parent} on {platform.node()}. A run that was submitted to a "
            "service is driven on a node of the cluster, which needs the folder of runs at the same path: put it on "
            "a file system that they share, and start `troupe serve --runs` with that path"
        )
    try:
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        raise ConfigError(f"--log {file}: {error.strerror}") from None
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # none may come before they are ignored
    if os.fork() == 0:
        try:
            for each in ENDING:
                signal.signal(each, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.dup2(reader, 0)
            os.closerange(3, max(reader, writer) + 1)
            os.execvp("tee", ["tee", "-a", str(file)])
        finally:
            os._exit(127)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.close(reader)
    for standard in (1, 2):
        os.dup2(writer, standard)
    os.close(writer)
    # Made again: one that was opened on a file takes it for granted that it can seek.
    sys.stdout, sys.stderr = _made_again(1, sys.stdout), _made_again(2, sys.stderr)


def _made_again(descriptor: int, stream: TextIO) -> TextIO:
    binary = io.FileIO(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(binary), encoding=stream.encoding, errors=stream.errors, line_buffering=True
    )
