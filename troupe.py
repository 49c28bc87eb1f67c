"""Troupe as a library: what `import troupe` offers. Each name is imported when it is first used.

import troupe

config = troupe.load_config("grpo_arithmetic", ["phases.grpo.train.steps=20"])
result = troupe.run(config)                # in this process; also in a notebook, inside its running event loop
print(result.scores, result.model)

handle = troupe.start(config)              # in a process of its own: events(), metrics(), pause(), checkpoint(), ...

handle = troupe.submit(config, priority=5)  # to the service of the folder `runs`, which starts it once there is room

troupe.resume(handle.folder)               # continues a run that has ended, from its newest checkpoint
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from orchestrator.import_pin import pin

if TYPE_CHECKING:
    from actors.errors import ConfigError, DataError, Interrupted, PlacementError, RunError, TroupeError, UserError
    from orchestrator.api import attach, resume, start
    from orchestrator.completions.evaluate import evaluate
    from orchestrator.completions.generate import generate
    from orchestrator.completions.score import score
    from orchestrator.config.loading import load_config, load_run, recipes
    from orchestrator.config.schema import RunConfig
    from orchestrator.model_folders.export import export
    from orchestrator.model_folders.merge import merge
    from orchestrator.result import RunResult
    from orchestrator.run import run
    from orchestrator.run_handle import RunHandle
    from orchestrator.service.client import submit

__all__ = (
    "ConfigError",
    "DataError",
    "Interrupted",
    "PlacementError",
    "RunConfig",
    "RunError",
    "RunHandle",
    "RunResult",
    "TroupeError",
    "UserError",
    "attach",
    "evaluate",
    "export",
    "generate",
    "load_config",
    "load_run",
    "merge",
    "recipes",
    "resume",
    "run",
    "score",
    "start",
    "submit",
)
_ROOMS = {
    "actors.errors": (
        "ConfigError", "DataError", "Interrupted", "PlacementError", "RunError", "TroupeError", "UserError",
    ),
    "orchestrator.api": ("attach", "resume", "start"),
    "orchestrator.completions.evaluate": ("evaluate",),
    "orchestrator.completions.generate": ("generate",),
    "orchestrator.completions.score": ("score",),
    "orchestrator.config.schema": ("RunConfig",),
    "orchestrator.config.loading": ("load_config", "load_run", "recipes"),
    "orchestrator.model_folders.export": ("export",),
    "orchestrator.model_folders.merge": ("merge",),
    "orchestrator.result": ("RunResult",),
    "orchestrator.run": ("run",),
    "orchestrator.run_handle": ("RunHandle",),
    "orchestrator.service.client": ("submit",),
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
