"""Weights to flat buckets of bytes and back. A bucket is what travels: one message instead of one per parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rollout.weights.protocol import Manifest, TensorMeta


@dataclass(frozen=True)
class ManifestOf:
    """An export consumer that only looks: names and shapes in the order of sending, and the dtype on the wire."""

    dtype: str
    bucket_bytes: int

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> Manifest:
        tensors = tuple(TensorMeta(name, self._wire(tensor), tuple(tensor.shape)) for name, tensor in weights)
        return Manifest(tensors, self.bucket_bytes)

    def _wire(self, tensor: Tensor) -> str:
        return self.dtype if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")


def fill(manifest: Manifest, weights: Iterable[tuple[str, Tensor]]) -> Iterator[Tensor]:
    """Flat uint8 buckets of the weights, cast to the manifest's dtypes. Each bucket is a buffer of its own, so one may
    be in flight while the next is filled. Raises ValueError if the weights are not the manifest's."""
    stream = iter(weights)
    for bucket in manifest.buckets():
        flat: Tensor | None = None
        offset = 0
        for meta in bucket:
            name, tensor = next(stream)
            if name != meta.name or tuple(tensor.shape) != meta.shape:
                raise ValueError(f"expected {meta.name} {meta.shape}, the trainer sends {name} {tuple(tensor.shape)}")
            if flat is None:
                flat = torch.empty(sum(m.nbytes for m in bucket), dtype=torch.uint8, device=tensor.device)
            target = flat[offset : offset + meta.nbytes].view(getattr(torch, meta.dtype))
            target.copy_(tensor.detach().reshape(-1))
            offset += meta.nbytes
        assert flat is not None
        yield flat


def unfold(bucket: tuple[TensorMeta, ...], flat: Tensor) -> list[tuple[str, Tensor]]:
    """The tensors of a received bucket, as views of it."""
    tensors, offset = [], 0
    for meta in bucket:
        values = flat[offset : offset + meta.nbytes].view(getattr(torch, meta.dtype)).view(meta.shape)
        tensors.append((meta.name, values))
        offset += meta.nbytes
    return tensors
