"""From rewards to advantages: pure numpy.

A *credit call* is what a credit stage executes. `credits(reads=..., writes=...)` names its columns; a call without it
reads `reward` and `group`, and writes `advantages`. What it reads decides where it runs:

    columns per row alone    in the driver: `call(table, **options) -> {column: [B]}`; a value of a column per token
                             holds at each of the row's tokens
    columns per token, too   where the tokens are, on every rank for its rows: `call(batch, world, state, **options) ->
                             ({column: [T]} or {column: [B]}, {metric: Stat})`; `world` sums over all ranks
                             (`actors.objective.World`), and what the call puts into the dictionary `state` it finds
                             there in the next step, also after a resume (`credit/returns.py` has such calls)

A reward of NaN says that the sample could not be scored: it takes no part in any mean, and is not learned from at all.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any, Literal, TypeVar

import numpy as np

from actors.batch import Array
from orchestrator.batches.row_table import RowTable

Scale = Literal["group", "batch", "none"]
STD_EPS = 1e-4  # added to standard deviations of rewards
CreditCall = TypeVar("CreditCall", bound=Callable[..., Any])


def credits(
    *, reads: set[str], writes: set[str], takes: Set[str] = frozenset(), whole_groups: bool = False
) -> Callable[[CreditCall], CreditCall]:
    """Declares the columns of a credit call. `takes`: those that it reads where a run has them: of episodes, or of
    steps that are rewarded one by one. `whole_groups`: a call on ranks has all rows of a group in one of them."""

    def declare(call: CreditCall) -> CreditCall:
        columns = {"reads": frozenset(reads), "writes": frozenset(writes), "takes": frozenset(takes)}
        call.__dict__.update(columns, whole_groups=whole_groups)
        return call

    return declare


@credits(reads={"reward", "group"}, writes={"advantages", "learned"})
def group_zscore(rows: RowTable, *, scale: Scale = "group") -> dict[str, Array]:
    """Each row's `zscore_by_group`, at each of its tokens. Rows that could not be scored are not learned from: with
    advantage 0 alone they would be in every denominator, and learn from KL and entropy."""
    advantages = zscore_by_group(rows["reward"], rows["group"], scale=scale)
    return {"advantages": advantages, "learned": learned(rows, ~np.isnan(rows["reward"]))}


@credits(reads={"reward", "group", "completion_tokens"}, writes={"advantages", "learned"})
def group_zscore_of_some(
    rows: RowTable, *, chosen: Callable[..., Array], scale: Scale = "group", **options: Any
) -> dict[str, Array]:
    """`group_zscore` of the rows that `chosen(table of a group, **options)` returns the numbers of; the others have
    advantage 0, take no part in any mean, and count among the rows and tokens that are learned from.

    Source: arXiv:2508.09726 (GFPO)."""
    rewards, group = np.full(len(rows), np.nan), rows["group"]
    for each in np.unique(group):
        members = np.flatnonzero(group == each)
        kept = members[chosen(rows.select(members), **options)]
        rewards[kept] = rows["reward"][kept]
    advantages = zscore_by_group(rewards, group, scale=scale)
    return {"advantages": advantages, "learned": learned(rows, ~np.isnan(rows["reward"]))}


@credits(reads={"reward_parts", "reward_weights", "group"}, writes={"advantages", "learned"})
def group_zscores_of_parts(rows: RowTable) -> dict[str, Array]:
    """Each reward's `zscore_by_group` by itself, their weighted sum, and its z-score over the batch, at each token of
    the row: a reward with a large spread does not drown the others. A reward without an opinion of a row is left out
    of that row's sum; a row of which none has one is not learned from.

    Source: arXiv:2601.05242 (GDPO)."""
    parts = np.asarray(rows["reward_parts"], np.float64)
    scored = np.asarray(~np.isnan(parts).all(axis=1))
    columns = [zscore_by_group(parts[:, index], rows["group"]) for index in range(parts.shape[1])]
    total = np.where(scored, (np.stack(columns, axis=1) * rows["reward_weights"]).sum(axis=1), np.nan)
    advantages = zscore_by_group(total, np.zeros(len(rows)), scale="batch")
    return {"advantages": advantages, "learned": learned(rows, scored)}


@credits(reads={"reward", "group"}, writes={"advantages", "learned"})
def leave_one_out(rows: RowTable, *, normalise: bool = False) -> dict[str, Array]:
    """Each row's reward beyond the mean of its siblings', at each of its tokens; rows that could not be scored are not
    learned from. `normalise`: then `(A - mean) / (std + 1e-4)` over the batch.

    Source: arXiv:2402.14740, section 3.2."""
    scored = ~np.isnan(rows["reward"])
    advantages = beyond_siblings(rows["reward"], rows["group"])
    if normalise:
        advantages = np.where(scored, advantages, np.nan)
        advantages = zscore_by_group(advantages, np.zeros(len(rows)), scale="batch")
    return {"advantages": advantages, "learned": learned(rows, scored)}


@credits(reads={"reward"}, writes={"reward"})
def clipped_rewards(rows: RowTable, *, lowest: float, highest: float) -> dict[str, Array]:
    """Rewards, brought within [lowest, highest]."""
    return {"reward": rows["reward"].clip(lowest, highest)}


def learned(rows: RowTable, wanted: Array) -> Array:
    """[B] bool: of the rows that are learned from so far, those that are `wanted`."""
    return wanted & rows["learned"] if "learned" in rows else wanted


@credits(
    reads={"reward", "group", "teacher_row_tokens", "completion_tokens"},
    writes={"demonstration", "teacher_row_tokens", "learned"},
)
def demonstrated_by_siblings(rows: RowTable, *, threshold: float) -> dict[str, Array]:
    """Of each row, a sibling whose reward is at least `threshold`, the next one after it, as its teacher's
    demonstration. Rows without one are not learned from.

    Source: arXiv:2601.20802 (SDPO)."""
    shown, group = np.full(len(rows), -1), rows["group"]
    for each in np.unique(group):
        members = np.flatnonzero(group == each)
        right = members[rows["reward"][members] >= threshold]
        for row in members:
            others = [*right[right > row], *right[right < row]]
            shown[row] = others[0] if others else -1
    added = np.where(shown < 0, 0, rows["completion_tokens"][shown]) - 1  # in the place of one that stood for them
    tokens = rows["teacher_row_tokens"] + added
    return {"demonstration": shown, "teacher_row_tokens": tokens, "learned": learned(rows, shown >= 0)}


@credits(reads={"truncated"}, writes={"learned"})
def mask_truncated(rows: RowTable) -> dict[str, Array]:
    """Completions that hit their length limit are not learned from, and not counted among the tokens.

    Source: arXiv:2503.14476, section 3.4 (overlong filtering)."""
    return {"learned": learned(rows, ~rows["truncated"])}


def zscore_by_group(rewards: Array, group: Array, *, scale: Scale = "group", eps: float = STD_EPS) -> Array:
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


def beyond_siblings(rewards: Array, group: Array) -> Array:
    """[B] float32: `r_i - mean of r_j, j ≠ i` over its group; 0 without a scored sibling."""
    rewards = np.asarray(rewards, np.float64)
    _, member = np.unique(group, return_inverse=True)
    scored = ~np.isnan(rewards)
    count = np.bincount(member, weights=scored)[member]
    centred = rewards - _mean_by(member, rewards, scored)[member]
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.where(count > 1, centred * count / (count - 1), 0.0)  # the mean of all, without the row itself
    return np.nan_to_num(found, nan=0.0).astype(np.float32)


def has_signal(rewards: Array) -> bool:
    """Whether a prompt's samples differ in reward, so that there is something to learn from them.

    As the predicate of a `keep` stage it is dynamic sampling.
    Source: arXiv:2503.14476, eq. 11, where rewards are 0 or 1.
    """
    scored = np.asarray(rewards)[~np.isnan(rewards)]
    return len(scored) > 1 and bool(np.ptp(scored) > 0)


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
