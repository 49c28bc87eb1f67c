"""The folder of the session of a Ray of our own, readable by this user only: its ports, sockets and logs.

/tmp/troupe-1000/      0700, this user's
  ray/                 of the Rays that runs start; Ray opens what it makes to everybody
  head-1f0c9a3b/       of the one that `troupe up` starts for a folder of runs
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path


def private_temp(head: Path | None = None) -> Path:
    """A folder for Ray's sessions that no other user can look into. Its path is short: the sockets in it add 64 bytes,
    and the path of a Unix socket has at most 107.

    `head`: a folder whose Ray gets one of its own. `ray start` writes the address of its Ray there, as that of "the
    current cluster", and where several Rays run, the drivers of jobs are given that address: in a folder that several
    heads share they would be given that of the head that was started last."""
    base = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    folder = base / f"troupe-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours_alone(folder):  # somebody else has made a folder of this name, or opened ours: not to be trusted
        folder = Path(tempfile.mkdtemp(prefix="troupe-", dir=base))
    if head is None:
        return folder / "ray"
    return folder / f"head-{hashlib.sha256(os.fsencode(head.resolve())).hexdigest()[:8]}"


def _is_ours_alone(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
