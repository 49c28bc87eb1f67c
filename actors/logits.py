"""From states to logits: the projection onto the vocabulary, and what a model does to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits of one chunk where the caller does not say how many rows. On a CPU, 64 MiB in float32. A GPU needs large
# products: with 152,000 tokens, chunks of 2**24 logits are 110 rows, and take more than twice as long as 2**28.
CHUNK_LOGITS = 2**24
LARGEST_CHUNK = 2**28
BYTES_PER_LOGIT = 256  # of a GPU's memory, for each logit of a chunk: with its copies it takes a thirtieth of it


@dataclass(frozen=True)
class LogitScaling:
    """How a model makes logits of states: a projection, then `softcap * tanh(multiplier * x / softcap)`."""

    multiplier: float = 1.0
    softcap: float | None = None
    float32: bool = False  # the projection itself is computed in float32, whatever the dtype of states and weights

    @classmethod
    def of(cls, config: Any, *, float32: bool = False) -> LogitScaling:
        """Read from a model's configuration: `logit_scale` (Cohere), `logits_scaling` (Granite: a divisor),
        `final_logit_softcapping` (Gemma)."""
        multiplier = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        return cls(multiplier / divisor, getattr(config, "final_logit_softcapping", None), float32)

    def cast(self, factor: Tensor | None) -> Tensor | None:
        """A factor of the projection, in the dtype that it is computed in."""
        return factor.float() if self.float32 and factor is not None else factor

    def product(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[n, V], a tensor of our own, before anything is made of it."""
        hidden, weight, bias = (self.cast(factor) for factor in (hidden, weight, bias))  # pyright: ignore
        return F.linear(hidden, weight, bias)

    def project(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[n, V] float32: what the model itself would put out, a tensor of our own."""
        return self.apply_(self.product(hidden, weight, bias).float())

    @property
    def changes_nothing(self) -> bool:
        return self.multiplier == 1.0 and self.softcap is None

    def apply_(self, logits: Tensor) -> Tensor:
        """In place."""
        if self.multiplier != 1.0:
            logits.mul_(self.multiplier)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def backward_(self, grad: Tensor, scaled: Tensor | None) -> Tensor:
        """In place: the gradient before scaling, from the one after it. `scaled` is needed if there is a softcap."""
        if self.softcap is not None and scaled is not None:
            grad.mul_(1 - (scaled / self.softcap).square())
        return grad if self.multiplier == 1.0 else grad.mul_(self.multiplier)


@dataclass(frozen=True)
class Vocabulary:
    """A model's projection onto its vocabulary: `weight` [V, H]."""

    weight: Tensor
    bias: Tensor | None
    scaling: LogitScaling

    def logits(self, hidden: Tensor, first: int) -> Tensor:
        """[n, first] float32: what the model itself would put out of the `first` entries of its vocabulary; a tensor of
        our own."""
        bias = None if self.bias is None else self.bias[:first]
        return self.scaling.project(hidden, self.weight[:first], bias)


def chunk_logits(device: torch.device) -> int:
    """Logits of one chunk on that device."""
    if device.type != "cuda":
        return CHUNK_LOGITS
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(CHUNK_LOGITS, min(LARGEST_CHUNK, memory // BYTES_PER_LOGIT))


def chunks(rows: int, largest: int) -> Iterator[slice]:
    """Consecutive rows in as few chunks as possible, of about equal size."""
    size = -(-rows // -(-rows // largest)) if rows else 1
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right. `total` is float32; on a GPU nothing is rounded to the factors' dtype before it is added.
    A CPU has no such product: it rounds each one."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right
