"""Where a Ray of our own keeps its session: its ports, sockets and logs are nobody else's.

/tmp/troupe-1000/      0700, this user's
  ray/                 Ray's; it opens what it makes to everybody
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def private_temp() -> Path:
    """A folder for Ray's sessions that no other user can look into. Its path is short, as Unix sockets ask for."""
    base = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    folder = base / f"troupe-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours_alone(folder):  # somebody else has made a folder of this name, or opened ours: not to be trusted
        folder = Path(tempfile.mkdtemp(prefix="troupe-", dir=base))
    return folder / "ray"


def _is_ours_alone(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
