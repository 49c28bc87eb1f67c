"""Files of a run that grow by a JSON line at a time, read while they are written.

LineReader(file).new()    for one reader: what came since it looked last
all_lines, last_lines     for many: what was read once is not read and parsed again
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from abc import ABC, abstractmethod
from array import array
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any, BinaryIO

TAIL_BYTES = 2**18  # holds the last few lines of metrics, whatever the method
KEPT = 64  # files whose lines are remembered, those that were asked for last
EDGE_BYTES = 64  # at either end of what was read: by them a file that was written anew is told

Stamp = tuple[int, int, int]  # inode, size, time of the last change
Line = dict[str, Any]


class GrowingFile(ABC):
    """What is known of a file of lines. Each look asks the file system whether it has changed and reads what was added;
    a file that was replaced or cut is read anew. `tail_bytes`: of a long file only the end is read; else `begins`: the
    position of the first line that is. Not locked."""

    def __init__(self, file: Path, tail_bytes: int | None = None, begins: int = 0) -> None:
        self.file, self._tail_bytes, self._begins = file, tail_bytes, begins
        self.stamp: Stamp | None = None
        self._head = self._edge = b""
        self._offset = 0

    @abstractmethod
    def took(self, start: int, line: bytes, value: Line) -> None:
        """A complete line was added, at this position in bytes."""

    @abstractmethod
    def forgot(self) -> None:
        """Nothing of what was taken is there any more."""

    def look(self) -> None:
        try:
            if _stamp(os.stat(self.file)) != self.stamp:
                with self.file.open("rb") as stream:
                    self._read(stream, _stamp(os.fstat(stream.fileno())))  # it may have been replaced meanwhile
        except FileNotFoundError:
            self._begin_again(b"", 0)
            self.stamp = None

    def _read(self, stream: BinaryIO, stamp: Stamp) -> None:
        head = stream.read(EDGE_BYTES)
        if self.stamp is None or stamp[0] != self.stamp[0] or not self._goes_on(stream, head):
            self._begin_again(head, stamp[1])
        stream.seek(self._offset)
        text = stream.read()
        whole = text[: text.rfind(b"\n") + 1]
        if self._tail_bytes and self._offset and not self._edge:  # the middle of a long file, and so of a line
            cut = whole.find(b"\n") + 1
            whole, self._offset = whole[cut:], self._offset + cut
        position = self._offset
        for line in whole.splitlines(keepends=True):
            bare = line.rstrip(b"\r\n")
            if (value := parsed(bare)) is not None:
                self.took(position, bare, value)
            position += len(line)
        self._offset, self._edge = position, (self._edge + whole[-EDGE_BYTES:])[-EDGE_BYTES:]
        self.stamp = stamp

    def _goes_on(self, stream: BinaryIO, head: bytes) -> bool:
        stream.seek(self._offset - len(self._edge))
        return head.startswith(self._head) and stream.read(len(self._edge)) == self._edge

    def _begin_again(self, head: bytes, size: int) -> None:
        self.forgot()
        self._head, self._edge = head, b""
        self._offset = self._begins if self._tail_bytes is None else max(0, size - self._tail_bytes)


class LineReader(GrowingFile):
    """The complete lines of a file, each given once. A file that is not there yet has none; an incomplete last line is
    given once it is whole, and one that a kill has cut off and another process has written on from is left out. Of a
    file that was replaced or cut, as a resumed run does with its metrics, the lines are given from the first on that
    is not the one that was given in its place before. `offset`: where to begin, in bytes."""

    def __init__(self, file: Path, offset: int = 0) -> None:
        super().__init__(file, begins=offset)
        self._given = array("q")  # a hash of each line
        self._number = 0  # of the next line
        self._new = list[Line]()

    def new(self) -> list[Line]:
        """Those that came since the last call."""
        self.look()
        found, self._new = self._new, []
        return found

    def took(self, start: int, line: bytes, value: Line) -> None:
        number, hashed = self._number, hash(line)
        self._number += 1
        if number == len(self._given) or self._given[number] != hashed:
            del self._given[number:]
            self._given.append(hashed)
            self._new.append(value)

    def forgot(self) -> None:
        self._number = 0


class _Lines(GrowingFile):
    """All lines, or those of the last `tail_bytes`."""

    def __init__(self, file: Path, tail_bytes: int | None) -> None:
        super().__init__(file, tail_bytes)
        self._lines = deque[tuple[int, Line]]()
        self._lock = threading.Lock()

    def lines(self) -> list[Line]:
        with self._lock:
            self.look()
            return [line for _, line in self._lines]

    def took(self, start: int, line: bytes, value: Line) -> None:
        self._lines.append((start, value))
        oldest = 0 if self._tail_bytes is None else start + len(line) - self._tail_bytes
        while self._lines and self._lines[0][0] < oldest:
            self._lines.popleft()

    def forgot(self) -> None:
        self._lines.clear()


_remembered: OrderedDict[tuple[str, int | None], _Lines] = OrderedDict()
_lock = threading.Lock()


def all_lines(file: Path) -> list[Line]:
    """The complete lines of a file, which are shared: not to be changed."""
    return _of(file, None).lines()


def last_lines(file: Path, tail_bytes: int = TAIL_BYTES) -> list[Line]:
    """The complete lines in the last `tail_bytes` of a file, without the rest of it; not to be changed."""
    return _of(file, tail_bytes).lines()


def _of(file: Path, tail_bytes: int | None) -> _Lines:
    key = os.path.abspath(file), tail_bytes
    with _lock:
        found = _remembered.setdefault(key, _Lines(file, tail_bytes))
        _remembered.move_to_end(key)
        while len(_remembered) > KEPT:
            _remembered.popitem(last=False)
    return found


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_ino, found.st_size, found.st_mtime_ns


def parsed(line: bytes) -> Line | None:
    """None for what is no JSON object: a kill has cut it off."""
    with contextlib.suppress(ValueError):
        value = json.loads(line)
        if isinstance(value, dict):
            return value
    return None
