"""The contract of weight transports.

A sync is one control call per side: the driver asks the trainer to `send` and every member to `receive`, at the same
time. The receiver stages the tensors beside the running weights; the engine's own thread applies them between two
decoding steps. Each receiver answers with an `Ack`; the driver promotes exactly the members whose ack equals the
sender's report.

    driver ──send(order)──► trainer rank 0 ──buckets──► member 1 ─┐
       │                          └─────────buckets──► member 2 ─┤ stage, apply, Ack(version, fingerprint)
       └──receive(order)──────────────────────────────► each  ◄──┘
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

# Of what an engine holds: the model that it follows, that model's adapters alone, or the model that it mixes in.
Part = Literal["own", "adapters", "second"]


@dataclass(frozen=True)
class TensorMeta:
    """Name (Hugging Face's), dtype name as in torch (`bfloat16`) and shape of one tensor on the wire."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Manifest:
    """All tensors of a sync, in the order of sending. The same for every version of a run."""

    tensors: tuple[TensorMeta, ...]
    bucket_bytes: int

    def buckets(self) -> Iterator[tuple[TensorMeta, ...]]:
        """Consecutive tensors of at most `bucket_bytes` together, at least one each."""
        bucket: list[TensorMeta] = []
        size = 0
        for meta in self.tensors:
            if bucket and size + meta.nbytes > self.bucket_bytes:
                yield tuple(bucket)
                bucket, size = [], 0
            bucket.append(meta)
            size += meta.nbytes
        if bucket:
            yield tuple(bucket)

    @property
    def nbytes(self) -> int:
        return sum(meta.nbytes for meta in self.tensors)


@dataclass(frozen=True)
class Rendezvous:
    """Where the members of one epoch meet. A new epoch whenever the membership changes."""

    host: str
    port: int
    epoch: str
    members: tuple[str, ...]
    timeout_s: float
    topology: Literal["each", "all"] = "each"  # a broadcast of its own for every member, or one for all of them


@dataclass(frozen=True)
class SyncOrder:
    """One weight update. `id` makes it idempotent: a receiver that applied it already just acknowledges again."""

    id: str
    version: int
    transport: str  # key of `rollout.weights.TRANSPORTS`
    manifest: Manifest
    rendezvous: Rendezvous | None = None  # collective
    folder: str | None = None  # disk
    part: Part = "own"


@dataclass(frozen=True)
class SendReport:
    """What the sender did. `failed` maps a member to why it could not be served; the others were sent everything."""

    version: int
    fingerprint: str
    delivered: tuple[str, ...]
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Ack:
    """A receiver's answer, after the weights are in use."""

    member: str
    version: int
    fingerprint: str
    receive_seconds: float = 0.0
    stall_seconds: float = 0.0  # for how long decoding stood still


class Receiver(Protocol):
    """In a rollout worker, off the thread that decodes. Stages on the device that it was made for."""

    def receive(self, order: SyncOrder, payload: object = None) -> tuple[list[tuple[str, Tensor]], str]:
        """(staged weights, fingerprint). `payload` is what travels with the call, for transports that use it. Raises
        InfraFailure, with nothing staged, if the transfer did not complete."""
        ...

    def close(self) -> None: ...
