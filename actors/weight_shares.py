"""Weights from one group of ranks to another, each rank sending and receiving its own share.

source rank 0: weights a b c ──► of each, a slice per target rank ──► block 0,0  block 0,1
source rank 1: weights d e   ──►                                      block 1,0  block 1,1
                                                                          │          │
target rank 0 fetches blocks 0,0 and 1,0: its slice of every weight  ◄────┘          │
target rank 1 fetches blocks 0,1 and 1,1  ◄──────────────────────────────────────────┘
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.background_save import host_copy
from actors.errors import InfraFailure

Slices = Iterator[tuple[str, torch.Size, Tensor]]  # name, shape of the whole, this rank's slice of it, flat


@dataclass(frozen=True)
class Slice:
    """A part of a weight, as bytes."""

    name: str
    shape: tuple[int, ...]  # of the whole weight
    dtype: torch.dtype
    values: np.ndarray
    checksum: int


def own_slice(numel: int, rank: int, ranks: int) -> slice:
    """The part of a flat weight that is a rank's: equal parts, rounded up, as in DeepSpeed's ZeRO stage 3."""
    size = -(-numel // ranks)
    return slice(min(rank * size, numel), min((rank + 1) * size, numel))


def cut(
    weights: Iterator[tuple[str, Tensor]], total_bytes: int, *, rank: int, ranks: int, receivers: int
) -> list[list[Slice]]:
    """For each receiver, its slices of this rank's share of the weights. Goes through all of them, as gathering needs;
    the shares of ranks 0, 1, ... are consecutive."""
    blocks: list[list[Slice]] = [[] for _ in range(receivers)]
    share, before = max(1, -(-total_bytes // ranks)), 0
    for name, tensor in weights:
        if min(before // share, ranks - 1) == rank:
            for receiver, block in enumerate(blocks):
                part = tensor.detach().reshape(-1)[own_slice(tensor.numel(), receiver, receivers)]
                values = _on_host(part).view(torch.uint8).numpy()
                block.append(Slice(name, tuple(tensor.shape), tensor.dtype, values, zlib.crc32(values.data)))
        before += tensor.nbytes
    return blocks


def joined(blocks: Sequence[Sequence[Slice]]) -> Slices:
    """A receiver's slices of all weights, from the blocks of all senders in the order of their ranks. Raises
    InfraFailure, before the first, if there are other bytes than were sent."""
    slices = [each for block in blocks for each in block]
    for each in slices:
        if zlib.crc32(each.values.data) != each.checksum:
            raise InfraFailure(f"{each.name} arrived with other bytes than were sent")
    for each in slices:
        values = torch.tensor(each.values).view(each.dtype)  # a copy: the object store's memory cannot be written
        yield each.name, torch.Size(each.shape), values


def _on_host(part: Tensor) -> Tensor:
    host = host_copy(part)
    if part.device.type == "cuda":
        torch.cuda.current_stream(part.device).synchronize()
    return host
