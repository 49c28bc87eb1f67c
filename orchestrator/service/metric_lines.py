"""The metrics of a run as bytes of JSON. A line is parsed once, when it is first seen, and given as it was written.

metrics.jsonl ──► step, phase and position of each line ──► the lines of an answer, read where they are
              └─► for the names that are asked for: these values of each line, kept for the next who asks
"""

from __future__ import annotations

import json
import os
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from orchestrator.json_lines import GrowingFile, Line
from orchestrator.reporting.metrics import FIELDS, METRICS_FILE

RUNS, SELECTIONS = 64, 8  # kept: runs, and of each the selections of names, those that were asked for last
ATTEMPTS = 3  # to read a file that a resumed run replaces meanwhile


class _Replaced(Exception):
    pass


class Selection:
    """Some metrics of each line that has one of them."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self.numbers, self.lines = array("q"), list[bytes]()  # which line of the file; what is given of it

    def add(self, number: int, value: Line) -> None:
        if not value.keys().isdisjoint(self._names):
            kept = {name: each for name, each in value.items() if name in self._names or name in FIELDS}
            self.numbers.append(number)
            self.lines.append(json.dumps(kept).encode())


class MetricLines(GrowingFile):
    """Steps never go back within a file: what a resumed run measures again is taken out of it before."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / METRICS_FILE)
        self._lock = threading.Lock()
        self._steps, self._starts, self._ends = array("q"), array("q"), array("q")
        self._phases: list[str | None] = []
        self._selections: OrderedDict[frozenset[str], Selection] = OrderedDict()

    def answer(self, *, after: int, phase: str | None, names: Sequence[str], limit: int) -> bytes:
        """A JSON list: the last `limit` lines after a step; with `names` only these metrics, of lines that have one."""
        with self._lock:
            for _ in range(ATTEMPTS):
                self.look()
                try:
                    lines = self._chosen(after, phase, names, limit)
                except _Replaced:
                    continue
                return b"[" + b",".join(lines) + b"]"
        return b"[]"

    def _chosen(self, after: int, phase: str | None, names: Sequence[str], limit: int) -> list[bytes]:
        if not names:
            return self._read_lines(self._numbers(range(len(self._steps)), after, phase, limit))
        selection = self._selection(frozenset(names))
        return [selection.lines[index] for index in self._numbers(selection.numbers, after, phase, limit)]

    def _numbers(self, lines: Sequence[int], after: int, phase: str | None, limit: int) -> Sequence[int]:
        """Positions in `lines`, which are numbers of lines in the file."""
        first = bisect_right(lines, after, key=lambda number: self._steps[number])
        if phase is None:
            return range(max(first, len(lines) - limit), len(lines))
        return [index for index in range(first, len(lines)) if self._phases[lines[index]] == phase][-limit:]

    def _read_lines(self, numbers: Sequence[int]) -> list[bytes]:
        if not numbers:
            return []
        with self.file.open("rb") as stream:
            if self.stamp is None or os.fstat(stream.fileno()).st_ino != self.stamp[0]:
                raise _Replaced
            begin = self._starts[numbers[0]]
            stream.seek(begin)
            text = stream.read(self._ends[numbers[-1]] - begin)
        return [text[self._starts[number] - begin : self._ends[number] - begin] for number in numbers]

    def _selection(self, names: frozenset[str]) -> Selection:
        found = self._selections.get(names)
        if found is None:
            found = Selection(names)
            for number, line in enumerate(self._read_lines(range(len(self._steps)))):
                found.add(number, json.loads(line))
            self._selections[names] = found
        self._selections.move_to_end(names)
        while len(self._selections) > SELECTIONS:
            self._selections.popitem(last=False)
        return found

    def took(self, start: int, line: bytes, value: Line) -> None:
        number = len(self._steps)
        self._steps.append(int(value.get("step", -1)))
        self._starts.append(start)
        self._ends.append(start + len(line))
        self._phases.append(value.get("phase"))
        for selection in self._selections.values():
            selection.add(number, value)

    def forgot(self) -> None:
        del self._steps[:], self._starts[:], self._ends[:], self._phases[:]
        self._selections.clear()


class MetricFiles:
    """Those of the runs that were asked for last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Path, MetricLines] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, folder: Path) -> MetricLines:
        with self._lock:
            found = self._kept.setdefault(folder, MetricLines(folder))
            self._kept.move_to_end(folder)
            while len(self._kept) > RUNS:
                self._kept.popitem(last=False)
        return found
