"""A process that can make files and write nothing into them, as on a full disk. It leaves what a process leaves that is
killed in between."""

from __future__ import annotations

import subprocess
import sys

from orchestrator.import_pin import ROOT

NO_ROOM = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"


def without_room(code: str, *arguments: object) -> str:
    """What Python prints about the error with which that code ends."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; {NO_ROOM}; {code}"
    done = subprocess.run(
        [sys.executable, "-B", "-c", program, *map(str, arguments)], stderr=subprocess.PIPE, text=True, timeout=200
    )
    assert done.returncode == 1, done.stderr
    return done.stderr
