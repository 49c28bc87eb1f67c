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
        words = torch.nn.functional.pad(bucket, (0, -bucket.numel() % 4)).view(torch.int32).to(torch.int64)
        weights = torch.arange(1, words.numel() + 1, device=bucket.device)
        self._sum = (self._sum * _MIX + int((words * weights).sum())) % 2**64

    def digest(self) -> str:
        value = self._hash.intdigest() if self._kind == "xxh3" else self._sum
        return f"{self._kind}:{value:016x}"
