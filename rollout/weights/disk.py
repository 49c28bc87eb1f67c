"""Weights through a shared folder: a safetensors file per version, written completely or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.errors import InfraFailure
from rollout.weights.buckets import Staged, fill, stage
from rollout.weights.fingerprint import Fingerprint
from rollout.weights.protocol import SendReport, SyncOrder


@dataclass(frozen=True)
class DiskWrite:
    """An export consumer: writes the buckets to a temporary file and renames it. Other versions are removed."""

    order: SyncOrder

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> SendReport:
        began, fingerprint = time.perf_counter(), Fingerprint()
        buckets: dict[str, Tensor] = {}
        for index, flat in enumerate(fill(self.order.manifest, weights)):
            host = flat.cpu()
            fingerprint.update(host)
            buckets[f"{index:06d}"] = host
        file = _file(self.order)
        _write_whole(file, buckets)
        for other in file.parent.glob("version-*.safetensors"):
            if other != file:
                other.unlink(missing_ok=True)
        return SendReport(self.order.version, fingerprint.digest(), (), {}, time.perf_counter() - began)


class DiskReceiver:
    def __init__(self, member: str, device: torch.device) -> None:
        self._member, self._device = member, device

    def receive(self, order: SyncOrder, payload: object = None) -> tuple[Staged, str]:
        file = _file(order)
        try:
            buckets = load_file(file)
            return stage(order.manifest, (buckets[name] for name in sorted(buckets)), self._device)
        except (OSError, ValueError, SafetensorError) as error:
            raise InfraFailure(f"{self._member}: no weights of version {order.version} at {file}: {error}") from None

    def close(self) -> None:
        """No resources are kept between two orders."""


def _file(order: SyncOrder) -> Path:
    if order.folder is None:
        raise ValueError(f"order {order.id} travels by disk and names no folder")
    return Path(order.folder) / f"version-{order.version}.safetensors"


def _write_whole(file: Path, buckets: dict[str, Tensor]) -> None:
    """Writes the file completely or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".tmp-{os.getpid()}")
    try:
        save_file(buckets, temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
