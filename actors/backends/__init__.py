"""How a model's weights are held, differentiated and stepped: one protocol, several backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from actors.backends.optimizer import OptimSpec
from actors.backends.protocol import Backend
from actors.errors import ConfigError
from actors.model import ModelSpec


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
    gpus: float = 0.0  # of this rank; 0: it computes on the CPU, whatever the machine has


def device_of(gpus: float, *, available: bool) -> torch.device:
    """Where a rank computes: on a GPU if it was given one, and on none that it was not. Raises ConfigError for a GPU
    that is not `available` to torch."""
    if gpus > 0 and not available:
        raise ConfigError(
            f"a role has gpus={gpus:g}, and torch sees no GPU in its process; install a torch with CUDA, or set "
            "roles.<role>.gpus=0 to compute on the CPU"
        )
    return torch.device("cuda" if gpus > 0 else "cpu")


def _single(model: ModelSpec, spec: BackendSpec, placement: Placement) -> Backend:
    from actors.backends.single import SingleBackend

    return SingleBackend(model, spec, placement)


def _deepspeed(model: ModelSpec, spec: BackendSpec, placement: Placement) -> Backend:
    from actors.backends.deepspeed import DeepSpeedBackend

    return DeepSpeedBackend(model, spec, placement)


BACKENDS: dict[str, Callable[[ModelSpec, BackendSpec, Placement], Backend]] = {
    "single": _single,
    "deepspeed": _deepspeed,
}


def build_backend(model: ModelSpec, spec: BackendSpec, placement: Placement) -> Backend:
    """The backend that `spec.kind` names, with the model loaded. Raises ConfigError for a kind that does not exist."""
    if spec.kind not in BACKENDS:
        raise ConfigError(f"backend {spec.kind!r} does not exist; there are {', '.join(sorted(BACKENDS))}")
    return BACKENDS[spec.kind](model, spec, placement)
