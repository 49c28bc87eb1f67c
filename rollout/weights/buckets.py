"""Weights to flat buckets of bytes and back. A bucket is one message, instead of one message per parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from rollout.weights.fingerprint import Fingerprint
from rollout.weights.protocol import Manifest, TensorMeta

ALIGNMENT = 16  # bytes; a view in another dtype must begin at a multiple of its size
Staged = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class ManifestOf:
    """An export consumer that only records names and shapes in the order of sending, and the dtype on the wire (None:
    each tensor's own)."""

    dtype: str | None
    bucket_bytes: int

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> Manifest:
        tensors = tuple(TensorMeta(name, self._wire(tensor), tuple(tensor.shape)) for name, tensor in weights)
        return Manifest(tensors, self.bucket_bytes)

    def _wire(self, tensor: Tensor) -> str:
        own = str(tensor.dtype).removeprefix("torch.")
        return (self.dtype or own) if tensor.is_floating_point() else own


def fill(manifest: Manifest, weights: Iterable[tuple[str, Tensor]], *, buffers: int | None = None) -> Iterator[Tensor]:
    """Flat uint8 buckets of the weights, cast to the manifest's dtypes; the same bytes for the same weights. Raises
    ValueError if the weights or their order differ from the manifest.

    Each bucket has its own memory, unless a number of `buffers` is given, which are reused in turn: a bucket is valid
    until that many later ones have been requested."""
    stream = iter(weights)
    first = list(islice(stream, 1))
    stream = chain(first, stream)
    device = first[0][1].device if first else torch.device("cpu")
    sizes = [bucket_bytes(bucket) for bucket in manifest.buckets()]
    turns = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in sizes[:buffers]] if buffers else []
    for index, (bucket, size) in enumerate(zip(manifest.buckets(), sizes, strict=True)):
        flat = turns[index % len(turns)][:size] if turns else torch.empty(size, dtype=torch.uint8, device=device)
        if size > sum(meta.nbytes for meta in bucket):
            flat.zero_()  # gaps of the alignment are part of the fingerprint
        for meta, (_, target) in zip(bucket, unfold(bucket, flat), strict=True):
            target.copy_(
                _next(stream, meta)
            )  # before the next one is requested: a gathered tensor may be freed by then
        yield flat
    for name, _ in stream:
        raise ValueError(f"the trainer sends {name}, which the manifest does not have")


def stage(manifest: Manifest, flats: Iterable[Tensor], device: torch.device) -> tuple[Staged, str]:
    """All tensors of the buckets on that device, and their fingerprint, computed where they arrived. They are views of
    the buckets if these arrived on that device. Raises ValueError if the buckets differ from the manifest."""
    fingerprint, staged = Fingerprint(), Staged()
    for bucket, flat in zip(manifest.buckets(), flats, strict=True):
        if flat.numel() != bucket_bytes(bucket):
            raise ValueError(f"a bucket of {flat.numel()} bytes, the manifest says {bucket_bytes(bucket)}")
        fingerprint.update(flat)
        staged += unfold(bucket, flat.to(device))
    return staged, fingerprint.digest()


def unfold(bucket: tuple[TensorMeta, ...], flat: Tensor) -> Staged:
    """The tensors of a bucket, as views of it."""
    tensors, offset = Staged(), 0
    for meta in bucket:
        values = flat[offset : offset + meta.nbytes].view(getattr(torch, meta.dtype)).view(meta.shape)
        tensors.append((meta.name, values))
        offset += _aligned(meta.nbytes)
    return tensors


def bucket_bytes(bucket: tuple[TensorMeta, ...]) -> int:
    """The size of a bucket on the wire, with the gaps that alignment leaves."""
    return sum(_aligned(meta.nbytes) for meta in bucket)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _next(stream: Iterator[tuple[str, Tensor]], meta: TensorMeta) -> Tensor:
    name, tensor = next(stream, (None, None))
    if tensor is None or name != meta.name or tuple(tensor.shape) != meta.shape:
        sent = "nothing more" if tensor is None else f"{name} {tuple(tensor.shape)}"
        raise ValueError(f"expected {meta.name} {meta.shape}, the trainer sends {sent}")
    return tensor.detach()
