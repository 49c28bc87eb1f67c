"""What a run needs of its surroundings, asked before its data is read: a folder that can be written to, and a Ray that
answers if it is told to use one."""

from __future__ import annotations

import os
from pathlib import Path

from actors.errors import ConfigError
from orchestrator.config import RunConfig
from orchestrator.ray_address import LOCAL, chosen_address, refuse_unreachable, set_by


def refuse_surroundings(config: RunConfig, *, local: bool = False, resume: Path | None = None) -> None:
    """Raises UserError where a run would fail however good its configuration is. Makes nothing. `local`: without Ray;
    `resume`: in this folder, wherever `output` was."""
    if resume is None:
        _refuse_output(config.output)
    if not local and (address := chosen_address(config.cluster)) != LOCAL:
        refuse_unreachable(address, set_by(config.cluster))


def _refuse_output(output: Path) -> None:
    """The nearest folder above that exists is where the others would be made."""
    place = output.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"output={output}: {place} is a file, not a folder; name a folder, it is made if need be")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"output={output}: {place} may not be written to by this user; name another folder")
