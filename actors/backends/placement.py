"""Which rank of its role a process is, and on which device it computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from actors.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """Which rank of a role this process is, and where the ranks meet (host and port of rank 0; None if it is alone)."""

    rank: int = 0
    world_size: int = 1
    master: tuple[str, int] | None = None


def device_of(gpus: float, *, available: bool) -> torch.device:
    """Where a rank computes: on a GPU if it was given one, and on none that it was not. Raises ConfigError for a GPU
    that is not `available` to torch."""
    if gpus > 0 and not available:
        raise ConfigError(
            f"a role has gpus={gpus:g}, and torch sees no GPU in its process; install a torch with CUDA, or set "
            "roles.<role>.gpus=0 to compute on the CPU"
        )
    return torch.device("cuda" if gpus > 0 else "cpu")
