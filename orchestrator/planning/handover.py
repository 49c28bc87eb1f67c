"""Models that phases pass on: `${phases.NAME.model}` in a recipe is the model that phase NAME saves. Pure."""

from __future__ import annotations

import re
from pathlib import Path

MODEL_OF = re.compile(r"\$\{phases\.([\w.-]+)\.model\}")


def is_handed_over(path: str) -> bool:
    """Whether a path stands for a phase's model, which does not exist before that phase has ended."""
    return "${" in path


def phase_of(path: str) -> str | None:
    """The phase whose model a path stands for; None for any other path."""
    found = MODEL_OF.fullmatch(path)
    return found and found[1]


def kept_folder(run: Path, phase: str) -> Path:
    """The folder of a finished phase: `model/`, and the state of each role that it trained."""
    return run / "phases" / phase
