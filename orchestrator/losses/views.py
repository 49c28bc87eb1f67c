"""What a loss may see: typed views of one micro-batch and its forward pass.

The type of a loss's view declares what the loss reads. A field that is named like a column of the batch
(`actors/columns.py`) or like an extra of the forward pass (`declare.EXTRAS`) is filled from there. A field of type
`Tensor` is always read; one of type `Tensor | None` is None unless the loss declares that it reads it under its options,
so a loss cannot see by accident what its pipeline does not provide by design.

Axes: `T` tokens, `B` rows, `P` pairs. `mask` is what the loss is summed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Any, ClassVar, Self, get_type_hints

import torch
from torch import Tensor

from actors.columns import COLUMNS
from actors.objective import MicroBatch, Outputs, Stat
from orchestrator.losses.declare import EXTRAS


def given(values: Tensor | None) -> Tensor:
    """A field that the loss declared to read under its options."""
    if values is None:
        raise TypeError("a loss looked at a field that it does not declare with @reads under these options")
    return values


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Every token with its log-probability under the weights that are trained."""

    keep_groups: ClassVar[bool] = False  # rows of a group must share a micro-batch

    micro: MicroBatch
    logps: Tensor  # [T], carries the gradient
    mask: Tensor  # [T] bool
    shared: Mapping[str, Tensor]  # statistics over all micro-batches and ranks, without gradient
    entropy: Tensor | None = None  # [T], nats
    is_top1: Tensor | None = None  # [T]
    mean_logps: Tensor | None = None  # [T], mean log-probability over the vocabulary

    @classmethod
    def of(cls, micro: MicroBatch, outputs: Outputs, names: frozenset[str], shared: Mapping[str, Tensor]) -> Self:
        """The view of one micro-batch; of the optional fields, those in `names`."""
        values: dict[str, Any] = {name: micro[name] for name in names if name in COLUMNS}
        values |= {name: outputs.extra[name] for name in names if name in EXTRAS}
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in values.items() if name in known}
        return cls(**{**values, "micro": micro, "logps": outputs.logps, "mask": cls.mask_of(micro), "shared": shared})

    @classmethod
    @cache
    def always_reads(cls) -> frozenset[str]:
        """Columns and extras whose fields are not optional."""
        hints = get_type_hints(cls)
        return frozenset(name for name in COLUMNS.keys() | EXTRAS if hints.get(name) is Tensor)

    @staticmethod
    def mask_of(micro: MicroBatch) -> Tensor:
        """[T] bool: the tokens that the loss is summed over."""
        return micro["mask"]

    @staticmethod
    def count_items(micro: MicroBatch) -> int:
        """Of what a mean over items counts: rows, or pairs."""
        return len(micro)

    @cached_property
    def counts(self) -> Tensor:
        """[B]: masked tokens of each row."""
        return self.micro.sum_by_row(self.mask.to(self.logps.dtype))

    def row_sums(self, values: Tensor) -> Tensor:
        """[T] -> [B]: sums over the masked tokens of each row."""
        return self.micro.sum_by_row(torch.where(self.mask, values, 0))

    def row_means(self, values: Tensor) -> Tensor:
        """[T] -> [B]: means over the masked tokens of each row; 0 for a row without any."""
        return self.row_sums(values) / self.counts.clamp(min=1)

    def token_stat(self, values: Tensor) -> Stat:
        """A metric that is the mean over masked tokens, of all micro-batches and ranks."""
        return Stat(torch.where(self.mask, values.detach(), 0).sum(), self.mask.sum())


@dataclass(frozen=True, kw_only=True)
class PolicyTokens(Tokens):
    """Sampled tokens with their advantages."""

    advantages: Tensor  # [T]
    old_logps: Tensor | None = None  # [T], before this batch's updates
    sample_logps: Tensor | None = None  # [T], under the sampler
    ref_logps: Tensor | None = None  # [T]
