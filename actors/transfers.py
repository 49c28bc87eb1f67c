"""Copies from the host to a role's device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actors.imports import torch

if TYPE_CHECKING:
    from torch import Tensor


def on_device(values: Any, device: torch.device | str) -> Tensor:
    """A copy of numbers that the host has (an array, a list, a tensor) on the device. A GPU makes it after what it has
    to do already, and this process does not wait for it."""
    device = torch.device(device)
    if device.type != "cuda":
        return torch.tensor(values, device=device) if not isinstance(values, torch.Tensor) else values.to(device)
    host = values if isinstance(values, torch.Tensor) else torch.tensor(values)
    return host.pin_memory().to(device, non_blocking=True)  # of memory that may be paged out, the host waits for a copy
