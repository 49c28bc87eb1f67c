"""A fingerprint of the transferred bytes. Sender and receiver have the same weights if their fingerprints are equal."""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor

_MIX = 0x9E3779B1  # odd, so that multiplication by it is invertible modulo 2**64


class Fingerprint:
    """Fed with flat uint8 buckets in the order of sending. On a CPU a hash of the bytes; on an accelerator a position-
    weighted checksum that is computed there, so that nothing is copied off the device. The prefix names which, so that
    two that were not computed alike never look equal."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()
        self._sum = 0
        self._kind = "xxh3"

    def update(self, bucket: Tensor) -> None:
        if bucket.device.type == "cpu":
            self._hash.update(bucket.numpy().data)
            return
        self._kind = "sum64"
        self._sum = (self._sum * _MIX + weighted_sum(bucket)) % 2**64

    def digest(self) -> str:
        value = self._hash.intdigest() if self._kind == "xxh3" else self._sum
        return f"{self._kind}:{value:016x}"


def weighted_sum(bucket: Tensor, slice_words: int = 2**22) -> int:
    """The sum of a flat uint8 tensor's 32-bit words, the last one padded with zeros, each times its position (from 1),
    modulo 2**64. Computed in slices, because 64-bit copies of a large embedding would take several times its memory."""
    whole = bucket.numel() // 4
    total = torch.zeros((), dtype=torch.int64, device=bucket.device)
    words = bucket[: 4 * whole].view(torch.int32)
    for begin in range(0, whole, slice_words):
        part = words[begin : begin + slice_words].to(torch.int64)
        total += part.mul_(torch.arange(begin + 1, begin + 1 + len(part), device=bucket.device)).sum()
    if rest := bucket[4 * whole :].tolist():
        total += (whole + 1) * int.from_bytes([*rest, *[0] * (4 - len(rest))], "little", signed=True)
    return int(total)
