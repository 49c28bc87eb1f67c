"""The only place where a loss becomes a scalar.

Each reduction is a local sum over a *global* count: the count is summed over all micro-batches and ranks of an
optimizer step before the first gradient, so neither the micro-batching nor the number of ranks changes the result. A
row with an empty mask (a truncated sample, or one that no reward could score) is in no count: with any reduction, the
result is the same as without that row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from actors.imports import torch
from actors.objective import MicroBatch
from orchestrator.losses.views import View

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Reduction:
    """`total(values, view)` of a micro-batch over the sum of `count(view type, micro-batch)` of all of them."""

    total: Callable[[Tensor, View], Tensor]
    count: Callable[[type[View], MicroBatch], float]

    def __call__(self, values: Tensor, view: View, count: float) -> Tensor:
        """This micro-batch's share of the scalar. `count` is the global count; 0 for a batch without any."""
        return self.total(values, view) / max(count, 1.0)


def _masked_sum(values: Tensor, view: View) -> Tensor:
    return torch.where(view.mask, values, 0).sum()


def _sum_of_row_means(values: Tensor, view: View) -> Tensor:
    return view.row_means(values).sum()


def _sum(values: Tensor, view: View) -> Tensor:
    return values.sum()


def _count_tokens(view: type[View], micro: MicroBatch) -> float:
    return float(view.mask_of(micro).sum())


def _count_rows(view: type[View], micro: MicroBatch, each: float = 1.0) -> float:
    """`each` for every row with a token to learn from."""
    return each * float((micro.sum_by_row(view.mask_of(micro).long()) > 0).sum())


def _count_items(view: type[View], micro: MicroBatch) -> float:
    return float(view.count_items(micro))


token_mean = Reduction(_masked_sum, _count_tokens)
"""[T]: sum over masked tokens / number of masked tokens. Every token weighs the same (SFT, DAPO)."""

row_mean_of_token_means = Reduction(_sum_of_row_means, _count_rows)
"""[T]: mean over rows of each row's token mean. Every row weighs the same (GRPO)."""

row_mean_of_token_sums = Reduction(_masked_sum, _count_rows)
"""[T]: mean over rows of each row's token sum. A row weighs as much as it is long (LUSPO)."""

item_mean = Reduction(_sum, _count_items)
"""[B] or [P]: mean over the view's items, rows or pairs."""


def token_sum_over(max_tokens: int) -> Reduction:
    """[T]: sum over masked tokens / (rows x `max_tokens`): a constant, so that length has no influence (Dr. GRPO)."""
    return Reduction(_masked_sum, partial(_count_rows, each=float(max_tokens)))
