"""What a run needs besides its configuration: a writable folder, the libraries of its trackers, and a Ray that answers
if an address is given, which are checked before its data is read; and engines that can work where they are placed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from actors.errors import ConfigError
from orchestrator.cluster.ray_address import LOCAL, chosen_address, refuse_unreachable, set_by
from orchestrator.config.roles import EngineRole
from orchestrator.config.schema import RunConfig
from orchestrator.planning.prepared import Prepared
from orchestrator.reporting.trackers.table import refuse_missing
from rollout.engine import ENGINES
from rollout.vllm_build import refusal_without_gpus


def refuse_surroundings(config: RunConfig, *, local: bool = False, resume: Path | None = None) -> None:
    """Raises UserError if a run would fail whatever its configuration is. Creates nothing. `local`: without Ray;
    `resume`: in this folder, whatever `output` is."""
    if resume is None:
        _refuse_output(config.output)
    refuse_missing(config.logging.trackers)
    if not local and (address := chosen_address(config.cluster)) != LOCAL:
        refuse_unreachable(address, set_by(config.cluster))


def refuse_engines(prepared: Prepared, roles: Iterable[str], *, local: bool = False) -> None:
    """Raises ConfigError for an engine that the machine's vLLM was not built for. In a Ray of others each node may have
    another one, and the engine itself refuses."""
    config = prepared.config
    if not local and chosen_address(config.cluster) != LOCAL:
        return
    for role in roles:
        settings = config.roles[role]
        is_vllm = isinstance(settings, EngineRole) and ENGINES.get(settings.engine) == ENGINES["vllm"]
        if is_vllm and settings.gpus == 0 and (refusal := refusal_without_gpus(role)):
            raise ConfigError(f"roles.{role}.gpus=0: {refusal}")


def _refuse_output(output: Path) -> None:
    """Checks the nearest existing parent folder, in which the others would be created."""
    place = output.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ConfigError(
            f"output={output}: {place} is a file, not a folder; name a folder; it is created if it does not exist"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"output={output}: {place} may not be written to by this user; name another folder")
