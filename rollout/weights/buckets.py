"""Weights to flat buckets of bytes and back. A bucket is one message, instead of one message per parameter."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from actors.errors import first_lines
from rollout.weights.fingerprint import Fingerprint
from rollout.weights.protocol import Manifest, TensorMeta, TransferFailed

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


class Incoming:
    """The weights of an order on a receiver's side, bucket by bucket as they arrive: iterate once over (name, tensor),
    in a `with` block, whose end lets go of what is under way. A tensor is a view of its bucket, whose memory lives as
    long as anybody refers to it, so whoever keeps none of them has room for two buckets. Raises TransferFailed if they
    do not arrive, or differ from the manifest."""

    def __init__(self, manifest: Manifest, flats: Iterable[Tensor], device: torch.device, what: str) -> None:
        """`what` fails to arrive, in the message of an error."""
        self._weights = self._unfolded(manifest, flats, device)
        self._what = what
        self._fingerprint = Fingerprint()
        self._begun = self._whole = False

    def __enter__(self) -> Incoming:
        return self

    def __exit__(self, *_: object) -> None:
        self._weights.close()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._weights

    def finish(self) -> str:
        """The fingerprint of all of them, computed where they arrived; those that nobody has taken are passed over."""
        deque(self._weights, maxlen=0)
        if not self._whole:
            raise TransferFailed(f"{self._what}: not all of them did", self._begun)
        return self._fingerprint.digest()

    def _unfolded(
        self, manifest: Manifest, flats: Iterable[Tensor], device: torch.device
    ) -> Generator[tuple[str, Tensor]]:
        arriving, why = iter(flats), ""
        try:
            for bucket in manifest.buckets():  # without `zip`, which would keep a bucket until it has the next one
                flat = next(arriving, None)
                if flat is None or flat.numel() != bucket_bytes(bucket):
                    came = "no bucket" if flat is None else f"a bucket of {flat.numel()} bytes"
                    raise ValueError(f"{came}, the manifest says {bucket_bytes(bucket)}")
                self._fingerprint.update(flat)
                self._begun = True
                yield from unfold(bucket, flat.to(device))
                del flat
            if next(arriving, None) is not None:
                raise ValueError("more buckets than the manifest says")
            self._whole = True
        except (RuntimeError, ValueError, OSError) as error:
            why = first_lines(error)
        if why:  # not inside `except`: the error's traceback would hold the connection that it came from
            raise TransferFailed(f"{self._what}: {why}", self._begun)


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
