"""What a finished run leaves. Light to import: the commands that only look at a run do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Gain:
    """What a phase gained. `before` is None if it was not measured. Steps and tokens: of the process that ended the
    run."""

    phase: str
    steps: int
    tokens: int
    measure: str
    before: float | None
    after: float | None


@dataclass(frozen=True)
class RunResult:
    """The result of a finished run: `scores` by label (`before`, then one per phase), and the paths of its files."""

    folder: Path
    scores: dict[str, float]
    checkpoint: Path | None
    model: Path | None
    averaged: Path | None  # the model with the averaged weights of the last phase
    picture: Path | None
    output: Path | None = None  # the data set that the last phase of those that make one made
    gains: tuple[Gain, ...] = ()  # what each phase gained
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])  # of this process, by activity

    def to_json(self) -> dict[str, Any]:
        """For the event `finished`."""
        paths = {
            "checkpoint": self.checkpoint,
            "model": self.model,
            "averaged": self.averaged,
            "picture": self.picture,
            "output": self.output,
        }
        return {
            "scores": self.scores,
            **{name: str(path.resolve()) if path else None for name, path in paths.items()},
            "gains": [asdict(each) for each in self.gains],
            "seconds": {on: round(spent, 3) for on, spent in self.seconds.items()},
        }

    @classmethod
    def from_json(cls, folder: Path, event: Mapping[str, Any]) -> RunResult:
        """Of the run in a folder, from its event `finished`."""
        named = ("checkpoint", "model", "averaged", "picture", "output")
        paths = {name: event.get(name) and Path(event[name]) for name in named}
        gains = tuple(Gain(**each) for each in event["gains"])
        return cls(folder, dict(event["scores"]), **paths, gains=gains, seconds=dict(event["seconds"]))
