"""The contract of weight transports.

A sync is one control call per side: the driver asks the trainer to `send` and every member to `receive`, at the same
time. An engine takes the weights between two decoding steps, bucket by bucket as they arrive: nobody holds a second
copy of a model. Each member answers with an `Ack`; the driver promotes exactly those whose ack equals the sender's
report.

    driver ──send(order)──► trainer rank 0 ──buckets──► engine 1 ──buckets──► engine 3 ...
       │                          └─────────buckets──► engine 2, process 0 ──► engine 2, process 1
       └──receive(order)──────────────────────────────► each: take every bucket, Ack(version, fingerprint)

A *member* is an engine's worker, which the driver calls. A *receiver* is a process that gets weights for itself: the
member's own, or each tensor-parallel process of its engine.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from actors.errors import InfraFailure

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


SENDER = ""  # in the place of a receiver's name: the trainer


@dataclass(frozen=True)
class Link:
    """Of the broadcast tree: `parent` sends every bucket to `child`. A link that is made anew has another id; while the
    id stays, both ends keep their connection. `depth`: links between the parent and the trainer."""

    id: str
    parent: str
    child: str
    depth: int = 0


@dataclass(frozen=True)
class Rendezvous:
    """Where the ends of the links meet: a store in the trainer's process. Whoever takes part gives up `timeout_s` after
    it has got the order, so that the driver, which waits a little longer, hears of it. `waited_s`: for how long it has
    had it already."""

    host: str
    port: int
    links: tuple[Link, ...]
    timeout_s: float
    waited_s: float = 0.0

    def seen_by(self, receivers: Container[str]) -> Rendezvous:
        """With the links of these receivers alone, or of the SENDER."""
        own = tuple(link for link in self.links if link.parent in receivers or link.child in receivers)
        return replace(self, links=own)


@dataclass(frozen=True)
class SyncOrder:
    """One weight update. `id` makes it idempotent: a member that applied it already just acknowledges again."""

    id: str
    version: int
    transport: str  # key of `rollout.weights.TRANSPORTS`
    manifest: Manifest
    rendezvous: Rendezvous | None = None  # collective
    folder: str | None = None  # disk
    part: Part = "own"

    def seen_by(self, receivers: Container[str]) -> SyncOrder:
        """With what these receivers need of it."""
        return self if self.rendezvous is None else replace(self, rendezvous=self.rendezvous.seen_by(receivers))

    def after(self, waited_s: float) -> SyncOrder:
        """For a receiver that has had it for so long."""
        return (
            self if self.rendezvous is None else replace(self, rendezvous=replace(self.rendezvous, waited_s=waited_s))
        )


@dataclass(frozen=True)
class SendReport:
    """What the sender did. `failed` maps a receiver that it sends to itself to why that one could not be served; the
    others were sent everything."""

    version: int
    fingerprint: str
    delivered: tuple[str, ...]
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Ack:
    """A member's answer, after the weights are in use."""

    member: str
    version: int
    fingerprint: str
    receive_seconds: float = 0.0  # from the order to the end
    stall_seconds: float = 0.0  # for how long decoding stood still


class TransferFailed(InfraFailure):
    """The weights did not arrive whole. `begun`: some of them have replaced older ones, so the engine holds a mixture
    and must not decode before it has got all of them."""

    def __init__(self, message: str, begun: bool = False) -> None:
        super().__init__(message)
        self.begun = begun


def receivers(member: str, processes: int) -> tuple[str, ...]:
    """Names of the processes of a member that receive weights, by rank."""
    return (member,) if processes == 1 else tuple(f"{member}/{rank}" for rank in range(processes))
