"""Weights as one object: the trainer returns its buckets, and workers that join later read them from the object store.

The object outlives the call, so a worker can join while the trainer is busy.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rollout.weights.buckets import Incoming, fill
from rollout.weights.fingerprint import Fingerprint
from rollout.weights.protocol import Manifest, SendReport, SyncOrder, TransferFailed

Payload = list[np.ndarray]  # one uint8 array per bucket; bfloat16 travels as its bytes


@dataclass(frozen=True)
class PackBuckets:
    """An export consumer: (report, payload). Call it so that the second stays where it is (`Worker.call_split`)."""

    manifest: Manifest
    version: int

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> tuple[SendReport, Payload]:
        began, fingerprint = time.perf_counter(), Fingerprint()
        payload: Payload = []
        for flat in fill(self.manifest, weights):
            host = flat.cpu()
            fingerprint.update(host)
            payload.append(host.numpy())
        return SendReport(self.version, fingerprint.digest(), (), {}, time.perf_counter() - began), payload


class ObjectStoreReceiver:
    """The payload arrives with the call, mapped from shared memory where the worker runs on the same node."""

    def __init__(self, name: str, device: torch.device) -> None:
        self._name, self._device = name, device

    def receive(self, order: SyncOrder, payload: object = None) -> Incoming:
        if not isinstance(payload, list):
            raise TransferFailed(f"{self._name}: order {order.id} came without its weights")
        what = f"{self._name}: order {order.id} came with other weights"
        return Incoming(order.manifest, map(torch.tensor, payload), self._device, what)  # copies: mapped read-only

    def close(self) -> None:
        """Nothing is held between two orders."""
