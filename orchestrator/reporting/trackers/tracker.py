"""What a tracker is given, and what it must do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Ended = Literal["finished", "interrupted", "failed"]  # how a run ended; an interrupted one may be resumed


@dataclass(frozen=True)
class TrackedRun:
    """`name` is unique, and stays the same when the run is resumed: a tracker that has a run of that name goes on with
    it. `project` groups runs. `settings`: dotted configuration key -> value."""

    name: str
    folder: Path
    project: str
    settings: Mapping[str, Any]


class Tracker(Protocol):
    """One run in one tracker. Made with a `TrackedRun`, which starts the run there or continues it. All calls, the
    first included, come from one thread of the tracker's own; each may raise any exception and take any time."""

    @property
    def place(self) -> str | None:
        """Where a person finds the run; None if the command line says it already."""
        ...

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step of the run, by tag; all are finite. A step may be written more than once."""
        ...

    def rewind(self, step: int) -> None:
        """The run was resumed from `step`: what was written for later steps is going to be written again."""
        ...

    def close(self, ended: Ended) -> None: ...
