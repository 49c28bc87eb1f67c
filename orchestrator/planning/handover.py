"""What phases pass on: in a recipe, `${phases.NAME.model}` is the model that phase NAME saves, and
`${phases.NAME.output}` the data set that it makes. Pure."""

from __future__ import annotations

import re
from pathlib import Path

MODEL_OF = re.compile(r"\$\{phases\.([\w.-]+)\.model\}")
OUTPUT_OF = re.compile(r"\$\{phases\.([\w.-]+)\.output\}")


def is_handed_over(path: str) -> bool:
    """Whether a path stands for what a phase leaves, which does not exist before that phase has ended."""
    return "${" in path


def phase_of(path: str) -> str | None:
    """The phase whose model a path stands for; None for any other path."""
    found = MODEL_OF.fullmatch(path)
    return found and found[1]


def output_of(path: str) -> str | None:
    """The phase whose data set a path stands for; None for any other path."""
    found = OUTPUT_OF.fullmatch(path)
    return found and found[1]


def written_folder(run: Path, phase: str) -> Path:
    """The folder of the data set that a phase makes."""
    return run / "data" / phase


def kept_folder(run: Path, phase: str) -> Path:
    """The folder of a finished phase: `model/`, and the state of each role that it trained."""
    return run / "phases" / phase
