"""Troupe as a library: what `import troupe` offers. Each name is imported when it is first used.

import troupe

config = troupe.load_config("grpo_arithmetic", ["phases.grpo.train.steps=20"])
result = troupe.run(config)                # also in a notebook, inside its running event loop
print(result.scores, result.model)

config = troupe.load_run(result.folder)    # a run that was stopped goes on from its newest checkpoint
troupe.run(config, resume=result.folder)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from orchestrator.imports import pin

if TYPE_CHECKING:
    from actors.errors import ConfigError, DataError, Interrupted, PlacementError, RunError, TroupeError, UserError
    from orchestrator.config import RunConfig
    from orchestrator.control import scale, standing
    from orchestrator.loading import load_config, load_run, recipes
    from orchestrator.run import RunResult, run

__all__ = (
    "ConfigError",
    "DataError",
    "Interrupted",
    "PlacementError",
    "RunConfig",
    "RunError",
    "RunResult",
    "TroupeError",
    "UserError",
    "load_config",
    "load_run",
    "recipes",
    "run",
    "scale",
    "standing",
)
_ROOMS = {
    "actors.errors": (
        "ConfigError", "DataError", "Interrupted", "PlacementError", "RunError", "TroupeError", "UserError",
    ),
    "orchestrator.config": ("RunConfig",),
    "orchestrator.control": ("scale", "standing"),
    "orchestrator.loading": ("load_config", "load_run", "recipes"),
    "orchestrator.run": ("RunResult", "run"),
}  # fmt: skip
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'troupe' has no attribute {name!r}; there are {', '.join(__all__)}")
    pin()
    value = getattr(importlib.import_module(_ROOM_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
