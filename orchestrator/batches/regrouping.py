"""From a prompt's samples to the rows that are learned from: pure functions on the driver's table of one prompt group.

A *regrouping* is what a `regroup` stage executes: `call(table, **options)` returns the new table, or None to have the
group replaced by another prompt's. `regroups(reads=..., writes=...)` names its columns, all of them per row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import numpy as np

from actors.batch import Array
from orchestrator.batches.row_table import RowTable
from orchestrator.credit.returns import without_eos

Ties = Literal["drop", "keep"]
Regrouping = TypeVar("Regrouping", bound=Callable[..., RowTable | None])


def regroups(*, reads: set[str], writes: set[str]) -> Callable[[Regrouping], Regrouping]:
    """Declares the columns of a regrouping."""

    def declare(call: Regrouping) -> Regrouping:
        call.__dict__.update(reads=frozenset(reads), writes=frozenset(writes))
        return call

    return declare


@regroups(reads={"reward"}, writes={"preferred"})
def best_and_worst(table: RowTable, *, ties: Ties = "drop") -> RowTable | None:
    """The pair of the sample with the highest reward, which is preferred, and the one with the lowest, in that order.

    Samples that could not be scored (NaN) take no part; with fewer than two others there is no pair: None. Among equal
    rewards the first sample is the best and the last one the worst, so of two samples the first is preferred if
    `r0 >= r1`. `ties`: if all rewards are equal, drop the group (None), or keep that pair.
    """
    scored = np.flatnonzero(~np.isnan(table["reward"]))
    if len(scored) < 2:
        return None
    rewards: Array = table["reward"][scored]
    best, worst = int(rewards.argmax()), len(rewards) - 1 - int(rewards[::-1].argmin())
    if ties == "drop" and rewards[best] == rewards[worst]:
        return None
    return table.select(scored[[best, worst]]).with_values(preferred=np.array([True, False]))


@regroups(reads={"reward", "truncated"}, writes={"reward"})
def penalise_missing_eos(table: RowTable, *, penalty: float) -> RowTable:
    """The same rows; `penalty` is subtracted from the reward of each completion that hit its length limit."""
    return table.with_values(**without_eos(table, penalty=penalty))


@regroups(reads={"reward", "sampler"}, writes={"optimal_value"})
def with_optimal_value(table: RowTable, *, beta: float, drop_unsolved: bool) -> RowTable | None:
    """The samples of the group's first sampler, with `V* = β log mean exp(r/β)` over the rewards of the other one's:
    the value of the prompt under the best policy whose KL to that sampler costs β a nat.

    Samples that could not be scored take no part; None if either sampler has no other. `drop_unsolved`: None, too, if
    none of the other sampler's rewards is above 0: it never solves the prompt.
    Source: arXiv:2505.20686 (A*-PO, stage 1)."""
    scored = ~np.isnan(table["reward"])
    first = table["sampler"] == 0
    rewards = table["reward"][scored & ~first].astype(np.float64)
    own = np.flatnonzero(scored & first)
    if not len(own) or not len(rewards) or (drop_unsolved and rewards.max() <= 0):
        return None
    highest_reward = rewards.max()  # taken out, so that no exponential overflows
    value = highest_reward + beta * np.log(np.exp((rewards - highest_reward) / beta).mean())
    return table.select(own).with_values(optimal_value=np.full(len(own), value, np.float32))


@regroups(reads={"reward", "win_rate", "sampler"}, writes={"preference"})
def preference_over_opponent(table: RowTable) -> RowTable | None:
    """The sample of the group's first sampler, with the probability that it is preferred to that of the other one, its
    opponent: what a pairwise judge says (`win_rate`); else `P = σ(r - r')`, the mean over the opponent's samples.

    Samples that could not be scored take no part; None if either sampler has no other.
    Source: arXiv:2312.00886, with rewards in the place of a preference model (Bradley-Terry) unless a judge is one."""
    scored, first = ~np.isnan(table["reward"]), table["sampler"] == 0
    own, opponents = np.flatnonzero(scored & first), np.flatnonzero(scored & ~first)
    if not len(own) or not len(opponents):
        return None
    if not np.isnan(table["win_rate"]).all():
        return table.select(own).with_values(preference=table["win_rate"][own])
    rewards = table["reward"].astype(np.float64)
    ahead = (rewards[own][:, None] - rewards[opponents][None, :]).clip(-500, 500)  # beyond, e^x is no number
    return table.select(own).with_values(preference=(1 / (1 + np.exp(-ahead))).mean(axis=1).astype(np.float32))


@regroups(reads={"reward", "win_rate"}, writes={"preference"})
def most_and_least_preferred(table: RowTable, *, hard: bool, ties: Ties = "drop") -> RowTable | None:
    """The sample that its siblings lose against most, and the one that loses most, in that order, each with the
    probability that it is preferred to a sibling: what a pairwise judge says (`win_rate`); else the mean of `σ(r - r')`
    over the siblings. `hard`: 1 and 0 instead.

    Samples that could not be scored take no part; with fewer than two others: None. `ties`: if all samples are
    preferred equally, drop the group (None), or keep the first and the last one with 1/2 each.
    Source: arXiv:2405.00675 (SPPO, algorithm 1)."""
    scored = np.flatnonzero(~np.isnan(table["reward"]))
    if len(scored) < 2:
        return None
    rates = table["win_rate"][scored].astype(np.float64)
    if np.isnan(rates).all():
        rewards = table["reward"][scored].astype(np.float64)
        ahead = (rewards[:, None] - rewards[None, :]).clip(-500, 500)  # beyond, e^x is no number
        rates = ((1 / (1 + np.exp(-ahead))).sum(axis=1) - 0.5) / (len(scored) - 1)  # 1/2 of it against itself
    most, least = int(np.nanargmax(rates)), len(rates) - 1 - int(np.nanargmin(rates[::-1]))
    tied = rates[most] == rates[least]
    if tied and ties == "drop":
        return None
    preference = [1.0, 0.0] if hard and not tied else [rates[most], rates[least]]
    return table.select(scored[[most, least]]).with_values(preference=np.array(preference, np.float32))


# Which samples of a group are learned from

FilterScores = Callable[[RowTable], Array]  # [G]: of a group's samples, those with the highest ones are kept


def shortest(table: RowTable) -> Array:
    """[G]: the fewer tokens were sampled, the higher. Source: arXiv:2508.09726 (GFPO)."""
    return -table["completion_tokens"].astype(np.float64)


def most_reward_per_token(table: RowTable) -> Array:
    """[G]: reward over sampled tokens. Source: arXiv:2508.09726 (GFPO, token efficiency)."""
    return table["reward"] / table["completion_tokens"].astype(np.float64).clip(min=1)


def highest(table: RowTable, scores: FilterScores, count: int) -> Array:
    """[<= count] int64, ascending: the scored rows of a group with the highest scores, the first of equal ones. A score
    of NaN is below all others. Raises ValueError for another number of scores than rows."""
    found = np.asarray(scores(table), np.float64)
    if found.shape != (len(table),):
        raise ValueError(f"a group filter must return one score for each of {len(table)} samples, got {found.shape}")
    candidates = np.flatnonzero(~np.isnan(table["reward"]))
    order = np.argsort(-np.nan_to_num(found[candidates], nan=-np.inf), kind="stable")
    return np.sort(candidates[order[:count]])


@regroups(reads={"reward", "completion_tokens"}, writes=set())
def keep_highest(table: RowTable, *, scores: FilterScores, count: int) -> RowTable:
    """The group without the others."""
    return table.select(highest(table, scores, count))


# Which samples become data


@regroups(reads={"reward"}, writes=set())
def best(table: RowTable, *, count: int) -> RowTable | None:
    """The `count` samples with the highest rewards, the first of equal ones; None if none could be scored."""
    chosen = highest(table, lambda rows: rows["reward"], count)
    return table.select(chosen) if len(chosen) else None


@regroups(reads={"reward"}, writes=set())
def accepted(table: RowTable, *, threshold: float) -> RowTable | None:
    """The samples whose reward reaches the threshold; None if none does."""
    return table.select(np.flatnonzero(table["reward"] >= threshold))  # NaN does not


@regroups(reads={"reward"}, writes={"label"})
def labelled(table: RowTable, *, threshold: float) -> RowTable:
    """The scored samples; those whose reward reaches the threshold are desirable."""
    scored = table.select(np.flatnonzero(~np.isnan(table["reward"])))
    return scored.with_values(label=scored["reward"] >= threshold)


@regroups(reads={"truncated"}, writes=set())
def ended(table: RowTable) -> RowTable:
    """Without the samples that hit their length limit."""
    return table.select(np.flatnonzero(~table["truncated"]))


@regroups(reads={"truncated", "episode"}, writes=set())
def last_turn(table: RowTable) -> RowTable | None:
    """The last turn of each episode. Episodes that a limit cut take no part: what they were asked last is not answered.
    None if there is no other."""
    last = _ends_of_episodes(table)[1]
    return table.select(last) if len(last) else None


@regroups(reads={"truncated", "episode"}, writes={"preferred"})
def last_turn_over_first(table: RowTable) -> RowTable | None:
    """A pair of each episode: its last turn is preferred to its first one. Episodes that a limit cut, or of one turn,
    take no part; None if there is no other.
    Source: arXiv:2212.08073 (Constitutional AI), section 3, where the last turn is a revision of the first."""
    first, last = _ends_of_episodes(table)
    several = first != last
    chosen = np.stack([last[several], first[several]], axis=1).reshape(-1)
    return table.select(chosen).with_values(preferred=np.tile([True, False], len(chosen) // 2)) if len(chosen) else None


def _ends_of_episodes(table: RowTable) -> tuple[Array, Array]:
    """[E], [E] int64: the first and the last row of each episode that came to its end, in order of appearance."""
    whole = np.flatnonzero(~table["truncated"])
    _, first = np.unique(table["episode"][whole], return_index=True)
    _, from_behind = np.unique(table["episode"][whole][::-1], return_index=True)
    order = np.argsort(first)
    return whole[first[order]], whole[len(whole) - 1 - from_behind[order]]


@regroups(reads={"sampler"}, writes={"preferred"})
def first_against_others(table: RowTable) -> RowTable | None:
    """A pair of each later sampler's row: the first sampler's row is preferred to it. None if either has no row.
    Source: arXiv:2401.01335 (SPIN), where the data's own completion comes first."""
    own, others = np.flatnonzero(table["sampler"] == 0), np.flatnonzero(table["sampler"] != 0)
    if not len(own) or not len(others):
        return None
    chosen = np.stack([np.full(len(others), own[0]), others], axis=1).reshape(-1)
    return table.select(chosen).with_values(preferred=np.tile([True, False], len(others)))


@regroups(reads={"reward", "group"}, writes={"preferred"})
def statistical_rejection(table: RowTable, *, beta: float, count: int) -> RowTable | None:
    """Pairs of `count` samples that stand for ones of the best policy near the sampler: each is accepted with the
    probability `exp((r - r_max)/β)`, `r_max` being the highest reward that is left, in as many passes as that takes.
    What is accepted is paired at random, and of a pair the higher reward is preferred; one of equal rewards is left
    out. The draws depend on the group alone, so a group that is sampled again gives the same pairs.
    Source: arXiv:2309.06657 (RSO), algorithm 1 and first-round ranking."""
    rewards = table["reward"].astype(np.float64)
    rng = np.random.default_rng(int(table["group"][0]) if len(table) else 0)
    left = rng.permutation(np.flatnonzero(~np.isnan(rewards))).tolist()
    taken: list[int] = []
    while left and len(taken) < count:
        bound = rewards[left].max()
        drawn = [row for row in left if rng.uniform() < np.exp((rewards[row] - bound) / beta)][: count - len(taken)]
        taken += drawn
        left = [row for row in left if row not in drawn]
    order = rng.permutation(taken).tolist()
    drawn_pairs = [(one, other) for one, other in zip(order[::2], order[1::2], strict=False)]
    ranked = [
        sorted(pair, key=lambda row: -rewards[row]) for pair in drawn_pairs if rewards[pair[0]] != rewards[pair[1]]
    ]
    chosen = np.array(ranked, np.int64).reshape(-1)
    return table.select(chosen).with_values(preferred=np.tile([True, False], len(ranked))) if ranked else None
