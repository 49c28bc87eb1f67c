"""Weights through a shared folder: a safetensors file per version, written completely or not at all."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rollout.weights.buckets import Incoming, fill
from rollout.weights.fingerprint import Fingerprint
from rollout.weights.protocol import SendReport, SyncOrder


@dataclass(frozen=True)
class DiskWrite:
    """An export consumer: writes the buckets to a temporary file and renames it. Other versions, and what a
    writer that was killed has left, are removed. A folder has one writer."""

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
    """Reads the file bucket by bucket."""

    def __init__(self, name: str, device: torch.device) -> None:
        self._name, self._device = name, device

    def receive(self, order: SyncOrder, payload: object = None) -> Incoming:
        file = _file(order)
        what = f"{self._name}: no weights of version {order.version} at {file}"
        return Incoming(order.manifest, _buckets(file), self._device, what)

    def close(self) -> None:
        """No resources are kept between two orders."""


def _buckets(file: Path) -> Iterator[Tensor]:
    try:
        with safe_open(file, framework="pt") as buckets:
            for name in sorted(buckets.keys()):
                yield buckets.get_tensor(name)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def _file(order: SyncOrder) -> Path:
    if order.folder is None:
        raise ValueError(f"order {order.id} travels by disk and names no folder")
    return Path(order.folder) / f"version-{order.version}.safetensors"


def _write_whole(file: Path, buckets: dict[str, Tensor]) -> None:
    """Writes the file completely or not at all."""
    # A folder of its own: the library writes under a name of its choice first. There is one writer, so what is in it
    # was left by one that was killed.
    unfinished = file.parent / "unfinished"
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    try:
        save_file(buckets, unfinished / file.name)
        (unfinished / file.name).replace(file)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # else the next one removes it, or says why it cannot
