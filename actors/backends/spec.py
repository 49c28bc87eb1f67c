"""Which backend a rank has, and which rank of its role it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actors.backends.optimizer import OptimSpec


@dataclass(frozen=True)
class Placement:
    """Which rank of a role this process is, and where the ranks meet (host and port of rank 0; None if it is alone)."""

    rank: int = 0
    world_size: int = 1
    master: tuple[str, int] | None = None


@dataclass(frozen=True)
class BackendSpec:
    """Which backend, with what optimizer. `optim=None` is a frozen role; `deepspeed` is passed through to DeepSpeed."""

    kind: str = "single"
    optim: OptimSpec | None = None
    deepspeed: dict[str, Any] | None = None
    zero_stage: int = 2  # used where `deepspeed` does not say
