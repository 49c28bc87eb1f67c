"""Weights through a folder that both sides see: a safetensors file per version, whole or absent."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.errors import InfraFailure
from rollout.weights.buckets import fill, unfold
from rollout.weights.fingerprint import Fingerprint
from rollout.weights.protocol import SendReport, SyncOrder


def _file(order: SyncOrder) -> Path:
    assert order.folder is not None
    return Path(order.folder) / f"version-{order.version}.safetensors"


@dataclass(frozen=True)
class DiskWrite:
    """An export consumer: writes the buckets beside their final name and renames. Older versions are removed."""

    order: SyncOrder

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> SendReport:
        began, fingerprint = time.perf_counter(), Fingerprint()
        buckets: dict[str, Tensor] = {}
        for index, flat in enumerate(fill(self.order.manifest, weights)):
            host = flat.cpu()
            fingerprint.update(host)
            buckets[f"{index:06d}"] = host
        file = _file(self.order)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".tmp-{os.getpid()}")
        save_file(buckets, temporary)
        temporary.replace(file)
        for older in file.parent.glob("version-*.safetensors"):
            if older != file:
                older.unlink(missing_ok=True)
        return SendReport(self.order.version, fingerprint.digest(), (), {}, time.perf_counter() - began)


class DiskReceiver:
    def __init__(self, member: str) -> None:
        self._member = member

    def receive(self, order: SyncOrder, payload: object = None) -> tuple[list[tuple[str, Tensor]], str]:
        try:
            buckets = load_file(_file(order))
        except (OSError, ValueError) as error:
            raise InfraFailure(f"{self._member}: no weights at {_file(order)}: {error}") from None
        fingerprint, staged = Fingerprint(), list[tuple[str, Tensor]]()
        for bucket, name in zip(order.manifest.buckets(), sorted(buckets), strict=True):
            flat = torch.as_tensor(buckets[name])
            fingerprint.update(flat)
            staged += unfold(bucket, flat)
        return staged, fingerprint.digest()

    def close(self) -> None:
        pass
