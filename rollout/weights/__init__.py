"""How weights get from the trainer to the engines. Only acknowledged versions count."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rollout.weights.buckets import ManifestOf
from rollout.weights.collective import CollectiveReceiver, CollectiveSend, OpenCollective
from rollout.weights.disk import DiskReceiver, DiskWrite
from rollout.weights.object_store import ObjectStoreReceiver, PackBuckets
from rollout.weights.protocol import Receiver

__all__ = [
    "TRANSPORTS",
    "CollectiveSend",
    "DiskWrite",
    "ManifestOf",
    "OpenCollective",
    "PackBuckets",
    "receiver",
]

TRANSPORTS: dict[str, Callable[[str, torch.device], Receiver]] = {
    "collective": CollectiveReceiver,
    "object_store": ObjectStoreReceiver,
    "disk": DiskReceiver,
}


def receiver(transport: str, member: str, device: torch.device) -> Receiver:
    """A member's side of a transport, which stages on that device. Raises KeyError for one that does not exist."""
    return TRANSPORTS[transport](member, device)
