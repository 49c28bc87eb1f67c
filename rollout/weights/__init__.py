"""How weights get from the trainer to the engines. Only acknowledged versions count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from rollout.weights.buckets import Incoming, ManifestOf
from rollout.weights.collective import CollectiveReceiver, CollectiveSend, OpenCollective
from rollout.weights.disk import DiskReceiver, DiskWrite
from rollout.weights.object_store import ObjectStoreReceiver, PackBuckets
from rollout.weights.protocol import SyncOrder

__all__ = [
    "TRANSPORTS",
    "CollectiveSend",
    "DiskWrite",
    "ManifestOf",
    "OpenCollective",
    "PackBuckets",
    "Receiver",
    "receiver",
]


class Receiver(Protocol):
    """A process's side of a transport. Used by the thread that loads the weights."""

    def receive(self, order: SyncOrder, payload: Any = None) -> Incoming:
        """The weights, as they arrive. `payload` is what travels with the call, for transports that use it."""
        ...

    def close(self) -> None: ...


TRANSPORTS: dict[str, Callable[[str, torch.device], Receiver]] = {
    "collective": CollectiveReceiver,
    "object_store": ObjectStoreReceiver,
    "disk": DiskReceiver,
}


def receiver(transport: str, name: str, device: torch.device) -> Receiver:
    """That process's side of a transport; weights end on that device. Raises KeyError for one that does not exist."""
    return TRANSPORTS[transport](name, device)
