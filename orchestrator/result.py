"""What a finished run leaves. Light to import: the commands that only look at a run do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Worth:
    """What a phase was worth. `before` is None where it was not measured. Steps and tokens: of the process that ended
    the run."""

    phase: str
    steps: int
    tokens: int
    measure: str
    before: float | None
    after: float | None


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves: `scores` by label (`before`, then one per phase), and where things are."""

    folder: Path
    scores: dict[str, float]
    checkpoint: Path | None
    model: Path | None
    averaged: Path | None  # the model with the average of the weights that the last phase went through
    picture: Path | None
    worth: tuple[Worth, ...] = ()  # what each phase gained
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])  # by what this process spent them on

    def to_json(self) -> dict[str, Any]:
        """For the event `finished`."""
        paths = {"checkpoint": self.checkpoint, "model": self.model, "averaged": self.averaged, "picture": self.picture}
        return {
            "scores": self.scores,
            **{name: str(path.resolve()) if path else None for name, path in paths.items()},
            "worth": [asdict(each) for each in self.worth],
            "seconds": {on: round(spent, 3) for on, spent in self.seconds.items()},
        }

    @classmethod
    def from_json(cls, folder: Path, event: Mapping[str, Any]) -> RunResult:
        """Of the run in a folder, from its event `finished`."""
        paths = {name: event[name] and Path(event[name]) for name in ("checkpoint", "model", "averaged", "picture")}
        worth = tuple(Worth(**each) for each in event["worth"])
        return cls(folder, dict(event["scores"]), **paths, worth=worth, seconds=dict(event["seconds"]))
