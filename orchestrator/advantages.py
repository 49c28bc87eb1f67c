"""From rewards to advantages: pure numpy, in the driver.

A *credit call* is what a credit stage executes: `call(batch, **options) -> {column: values}`, with per-token values
for per-token columns. `credits(reads=..., writes=...)` names its columns for the check that a pipeline closes; a call
without it reads `reward`, `group` and `mask`, and writes `advantages`.

A reward of NaN says that the sample could not be scored: it takes no part in any mean, and is not learned from at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import numpy as np

from actors.batch import Array, Batch

Scale = Literal["group", "batch", "none"]
CreditCall = TypeVar("CreditCall", bound=Callable[..., dict[str, Array]])


def credits(*, reads: set[str], writes: set[str]) -> Callable[[CreditCall], CreditCall]:
    """Declares the columns of a credit call."""

    def declare(call: CreditCall) -> CreditCall:
        call.__dict__.update(reads=frozenset(reads), writes=frozenset(writes))
        return call

    return declare


@credits(reads={"reward", "group", "mask"}, writes={"advantages", "mask"})
def group_zscore(batch: Batch, *, scale: Scale = "group") -> dict[str, Array]:
    """Each row's `zscore_by_group`, at each of its tokens. Rows that could not be scored are masked: with advantage 0
    alone they would be in every denominator, and learn from KL and entropy."""
    advantages = zscore_by_group(batch["reward"], batch["group"], scale=scale)
    return {"advantages": per_token(batch, advantages), "mask": batch["mask"] & scored_tokens(batch)}


def scored_tokens(batch: Batch) -> Array:
    """[T] bool: the tokens of rows that a reward could score."""
    return per_token(batch, ~np.isnan(batch["reward"]))


@credits(reads={"mask", "truncated"}, writes={"mask"})
def mask_truncated(batch: Batch) -> dict[str, Array]:
    """Completions that hit their length limit are not learned from, and not counted among the tokens.

    Source: arXiv:2503.14476, section 3.4 (overlong filtering)."""
    return {"mask": batch["mask"] & ~batch["truncated"][batch.row_of_token]}


def zscore_by_group(rewards: Array, group: Array, *, scale: Scale = "group", eps: float = 1e-4) -> Array:
    """[B] float32: `(r - mean of its group) / (std + eps)`.

    `scale`: over what the standard deviation (unbiased, n - 1) is taken; `none` divides by nothing. A group with one
    scored sample has nothing to compare with: 0.
    Source: arXiv:2402.03300, section 4.1.2; `batch`: arXiv:2508.08221; `none`: arXiv:2503.20783.
    """
    rewards = np.asarray(rewards, np.float64)
    _, member = np.unique(group, return_inverse=True)
    scored = ~np.isnan(rewards)
    centred = rewards - _mean_by(member, rewards, scored)[member]
    if scale == "group":
        centred = centred / (_std_by(member, rewards, scored)[member] + eps)
    elif scale == "batch":
        centred = centred / (_std_by(np.zeros_like(member), rewards, scored)[0] + eps)
    return np.nan_to_num(centred, nan=0.0).astype(np.float32)


def has_signal(rewards: Array) -> bool:
    """Whether a prompt's samples differ in reward, so that there is something to learn from them.

    As the predicate of a `keep` stage it is dynamic sampling.
    Source: arXiv:2503.14476, eq. 11, where rewards are 0 or 1.
    """
    scored = np.asarray(rewards)[~np.isnan(rewards)]
    return len(scored) > 1 and bool(np.ptp(scored) > 0)


def per_token(batch: Batch, values: Array) -> Array:
    """[B] -> [T]: each row's value at each of its tokens."""
    return np.repeat(values, batch.lengths)


def _mean_by(member: Array, values: Array, scored: Array) -> Array:
    """[G]: means over the scored members; NaN for a group without any."""
    count = np.bincount(member, weights=scored, minlength=member.max(initial=-1) + 1)
    total = np.bincount(member, weights=np.where(scored, values, 0.0))
    with np.errstate(invalid="ignore"):
        return total / count


def _std_by(member: Array, values: Array, scored: Array) -> Array:
    """[G]: unbiased standard deviations over the scored members; NaN where fewer than two are scored."""
    squares = np.square(values - _mean_by(member, values, scored)[member])
    count = np.bincount(member, weights=scored)
    total = np.bincount(member, weights=np.where(scored, squares, 0.0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt(np.where(count > 1, total / (count - 1), np.nan))
