"""Files of a run that grow by a JSON line at a time, read while they are written."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

TAIL_BYTES = 2**18  # holds the last few lines of metrics, whatever the method


class LineReader:
    """The complete lines of a file, each given once. A file that is not there yet has none; an incomplete last line is
    given once it is whole, and one that a kill has cut off and another process has written on from is left out."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        """Those that came since the last call."""
        with contextlib.suppress(FileNotFoundError), self._file.open("rb") as stream:
            stream.seek(self._offset)
            text = stream.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._offset += len(whole)
            return _parsed(whole)
        return []


def last_lines(file: Path, tail_bytes: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """The complete lines in the last `tail_bytes` of a file, without the rest of it."""
    with contextlib.suppress(FileNotFoundError), file.open("rb") as stream:
        start = max(0, stream.seek(0, 2) - tail_bytes)
        stream.seek(start)
        text = stream.read()
        if start:
            text = text[text.find(b"\n") + 1 :]
        return _parsed(text[: text.rfind(b"\n") + 1])
    return []


def _parsed(text: bytes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found
