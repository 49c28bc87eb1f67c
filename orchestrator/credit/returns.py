"""From rewards per row to advantages and returns per token, with the values of a critic: credit calls where the tokens
are.

Only trained tokens (`mask` 1) are time steps of an episode. Tokens between two of them (a tool's answer, say) take no
time: there is no discount over them, and the next state's value is that before the next trained token. A row's reward
is earned at its last trained token, but for what an environment gave for single turns, and a process reward model for
single steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from actors.batch import Array, Batch
from actors.columns import STEP_REWARDS
from actors.imports import torch
from actors.objective import Stat, World
from orchestrator.batches.row_table import RowTable
from orchestrator.credit.advantages import STD_EPS, Scale, credits, learned, zscore_by_group
from orchestrator.losses.surrogates import LARGEST_LOG

Credited = tuple[dict[str, Array], dict[str, Stat]]  # columns per token, and metrics
Estimator = Literal["k1", "k3"]
PLACED = STEP_REWARDS | {"turn_reward", "earlier_reward"}  # rewards with a place of their own in a row
LARGEST_ERROR = 0.2  # by which share of the target the controller lets a KL be off at most


@credits(reads={"reward"}, writes={"learned"})
def only_scored(rows: RowTable) -> dict[str, Array]:
    """Rows that could not be scored are not learned from, and their tokens are in no mean."""
    return {"learned": learned(rows, ~np.isnan(rows["reward"]))}


@credits(reads={"reward", "truncated"}, writes={"reward"})
def without_eos(rows: RowTable, *, penalty: float) -> dict[str, Array]:
    """`penalty` less for a completion that hit its length limit: it has no end-of-sequence token."""
    return {"reward": rows["reward"] - np.float32(penalty) * rows["truncated"]}


@credits(
    reads={"mask", "reward", "old_logps", "ref_logps"}, writes={"reward"}, takes={"group", "episode"}, whole_groups=True
)
def reward_less_kl(batch: Batch, world: World, state: dict[str, Any], *, coefficient: float) -> Credited:
    """[B]: `r - β Σ_t (lp_t - ref_t)` over the row's trained tokens, without gradient; of an episode each turn of which
    is a row, over those of all turns.

    Source: arXiv:2402.14740, eq. 3."""
    mask = batch["mask"]
    log_ratio = np.where(mask, batch["old_logps"].astype(np.float64) - batch["ref_logps"], 0.0)
    kl = batch.sum_by_row(log_ratio)
    if "episode" in batch:
        _, member = np.unique(np.stack([batch["group"], batch["episode"]], axis=1), axis=0, return_inverse=True)
        member = member.reshape(-1)
        kl = np.bincount(member, weights=kl, minlength=1)[member]
    reward = batch["reward"] - coefficient * kl
    return {"reward": reward.astype(np.float32)}, {"kl": _mean(log_ratio[mask])}


@credits(reads={"mask", "reward"}, writes={"step_reward"}, takes=PLACED)
def reward_at_the_end(batch: Batch, world: World, state: dict[str, Any]) -> Credited:
    """[T]: each row's reward at its last trained token, and 0 elsewhere. What an environment gave for a turn of an
    episode is at the last token of that turn, what a process reward model gave for a step is at the last token of that
    step, and the row's last one has the rest.

    Source: of steps, arXiv:2312.08935 (step-by-step PPO)."""
    earned, rows = _at_last_tokens(batch)
    return {"step_reward": earned}, {"objective/scores": _mean_over(rows, _scores(batch, rows))}


@credits(reads={"mask", "reward", "old_logps", "ref_logps"}, writes={"step_reward"}, takes=PLACED)
def kl_in_reward(
    batch: Batch,
    world: World,
    state: dict[str, Any],
    *,
    coefficient: float,
    estimator: Estimator = "k1",
    target: float | None = None,
    horizon: int = 10_000,
) -> Credited:
    """[T]: `-β KL_t`, and each row's reward as in `reward_at_the_end`. `k1`: `lp - ref`; `k3`: `e^(ref-lp) - 1 -
    (ref-lp)`, which is never negative.

    With `target`, β follows the KL of whole rows, over all ranks: `β ← β (1 + clip(KL/target - 1, ±0.2) n/horizon)`
    after a batch of n rows. It begins at `coefficient`, and is kept in `state`.
    Source: arXiv:1909.08593, section 2 and eq. 3; k3: http://joschu.net/blog/kl-approx.html.
    """
    beta = float(state.get("coefficient", coefficient))
    earned, rows = _at_last_tokens(batch)
    log_ratio = np.where(batch["mask"], batch["old_logps"].astype(np.float64) - batch["ref_logps"], 0.0)
    per_token = log_ratio if estimator == "k1" else _k3(log_ratio)
    kl = batch.sum_by_row(per_token)[rows]
    entropy = -batch.sum_by_row(np.where(batch["mask"], batch["old_logps"], 0.0))[rows]
    scores = _scores(batch, rows)
    if target is not None:
        state["coefficient"] = _adapted(beta, kl, world, target, horizon)
    return {"step_reward": (earned - beta * per_token).astype(np.float32)}, {
        "objective/kl": _mean_over(rows, kl),
        "objective/kl_coef": Stat(beta),
        "objective/entropy": _mean_over(rows, entropy),
        "objective/non_score_reward": _mean_over(rows, -beta * kl),
        "objective/rlhf_reward": _mean_over(rows, scores - beta * kl),
        "objective/scores": _mean_over(rows, scores),
    }


@credits(reads={"mask", "step_reward"}, writes={"step_reward"})
def whitened_rewards(batch: Batch, world: World, state: dict[str, Any]) -> Credited:
    """[T]: rewards of trained tokens divided by their standard deviation over all ranks; their mean stays."""
    mask, found = batch["mask"], np.zeros(batch.num_tokens, np.float32)
    found[mask] = whitened(batch["step_reward"][mask], world, shift_mean=False)
    return {"step_reward": found}, {}


@credits(reads={"mask", "step_reward", "values"}, writes={"advantages", "returns"})
def generalised_advantages(
    batch: Batch, world: World, state: dict[str, Any], *, gamma: float, lam: float, whiten: bool = True
) -> Credited:
    """[T], [T]: advantages `A_t = δ_t + γλ A_{t+1}`, `δ_t = r_t + γ V_{t+1} - V_t`, and returns `A_t + V_t`, over the
    trained tokens of each row; 0 elsewhere. Advantages are whitened over all ranks after the returns are taken.

    Source: arXiv:1506.02438, eq. 16."""
    mask, values = batch["mask"], batch["values"].astype(np.float64)
    of_trained = gae(batch["step_reward"][mask], values[mask], batch.row_of_token[mask], gamma, lam)
    returned = of_trained + values[mask]
    advantages, returns = np.zeros((2, batch.num_tokens), np.float32)
    advantages[mask] = whitened(of_trained, world) if whiten else of_trained
    returns[mask] = returned
    metrics = {"val/mean": _mean(values[mask]), "val/returns": _mean(returned)}
    explained = _explained_variance(returned, values[mask], world)
    if explained is not None:
        metrics["val/explained_variance"] = Stat(explained)
    return {"advantages": advantages, "returns": returns}, metrics


@credits(reads={"mask", "step_reward"}, writes={"advantages"})
def returns_to_go(batch: Batch, world: World, state: dict[str, Any], *, gamma: float, whiten: bool = True) -> Credited:
    """[T]: of each trained token what is still to be earned from it on, `Σ_k γ^k r_{t+k}`; 0 elsewhere. Whitened over
    all ranks, which takes the place of a critic.

    Source: arXiv:2501.03262 (REINFORCE++)."""
    mask, found = batch["mask"], np.zeros(batch.num_tokens, np.float32)
    nothing = np.zeros(int(mask.sum()))
    earned = gae(batch["step_reward"][mask], nothing, batch.row_of_token[mask], gamma, 1.0)
    found[mask] = whitened(earned, world) if whiten else earned
    return {"advantages": found}, {"objective/returns": _mean(earned)}


@credits(reads={"mask", "group"} | STEP_REWARDS, writes={"advantages"}, whole_groups=True)
def group_zscores_of_steps(batch: Batch, world: World, state: dict[str, Any], *, scale: Scale = "group") -> Credited:
    """[T]: of each trained token, the z-scores of the steps that end at it or later in its row, added up, times their
    weight; plus the z-score of the row's other rewards, if it has any; 0 elsewhere. A step is compared with all steps
    of its group, an answer's other rewards with those of its siblings.

    Source: arXiv:2402.03300, section 4.1.3 (process supervision), which has no other rewards."""
    mask, rows, probabilities = batch["mask"], batch.row_of_token, batch["process_reward"]
    ends = np.flatnonzero(~np.isnan(probabilities))
    of_step = rows[ends]
    steps = _zscores(probabilities[ends], batch["group"][of_step], scale, world)
    others = _zscores(batch["outcome_reward"], batch["group"], scale, world)
    earned, found = np.zeros((2, batch.num_tokens))
    earned[ends] = batch["process_weight"][of_step] * steps
    found[mask] = gae(earned[mask], np.zeros(int(mask.sum())), rows[mask], 1.0, 1.0) + others[rows[mask]]
    right = _mean(probabilities[ends].astype(np.float64))
    metrics = {"steps/mean_reward": right, "steps/per_answer": Stat(float(len(ends)), float(len(batch)))}
    return {"advantages": found.astype(np.float32)}, metrics


@credits(reads={"mask", "advantages"}, writes={"advantages"})
def whitened_advantages(batch: Batch, world: World, state: dict[str, Any]) -> Credited:
    """[T]: advantages of trained tokens with mean 0 and (unbiased) variance 1 over all ranks; 0 elsewhere.

    Source: arXiv:2501.03262 (global advantage normalisation)."""
    mask, found = batch["mask"], np.zeros(batch.num_tokens, np.float32)
    found[mask] = whitened(batch["advantages"][mask].astype(np.float64), world)
    return {"advantages": found}, {}


def gae(rewards: Array, values: Array, rows: Array, gamma: float, lam: float) -> Array:
    """[N] float64: generalised advantages of the steps of episodes, which follow one another; `rows` says of which
    episode each step is. After an episode's last step there is nothing."""
    _, starts, lengths = np.unique(rows, return_index=True, return_counts=True)
    place = np.arange(len(rows)) - np.repeat(starts, lengths)
    episode = np.repeat(np.arange(len(lengths)), lengths)
    delta = np.zeros((lengths.max(initial=0) + 1, len(lengths)))  # steps x episodes; 0 after the end
    value = np.zeros_like(delta)
    delta[place, episode], value[place, episode] = rewards, values
    delta[:-1] += gamma * value[1:] - value[:-1]
    for step in range(len(delta) - 2, -1, -1):
        delta[step] += gamma * lam * delta[step + 1]
    return delta[place, episode]


def whitened(values: Array, world: World, *, shift_mean: bool = True) -> Array:
    """[N]: values with (unbiased) variance 1 over all ranks, and mean 0 unless that is to stay."""
    count, total = _sums(world, len(values), values.sum())
    mean = total / max(count, 1.0)
    (squares,) = _sums(world, np.square(values - mean).sum())
    scaled = (values - mean) / np.sqrt(squares / max(count - 1.0, 1.0) + 1e-8)
    return scaled if shift_mean else scaled + mean


def _at_last_tokens(batch: Batch) -> tuple[Array, Array]:
    """[T] float64: each row's reward at its last trained token, less what its turns and steps were given, which is at
    theirs; [B] bool: rows that have a trained token."""
    trained = np.flatnonzero(batch["mask"])
    last = np.full(len(batch), -1)
    last[batch.row_of_token[trained]] = trained  # of several tokens of a row, the last one stays
    rows = last >= 0
    earned = np.zeros(batch.num_tokens)
    earned[last[rows]] = batch["reward"][rows]
    if "earlier_reward" in batch:  # a turn that is a row of its own earns what is still to come
        earned[last[rows]] -= batch["earlier_reward"][rows]
    for placed in _placed(batch):
        placed = np.where(batch["mask"], placed, 0.0)
        earned[last[rows]] -= batch.sum_by_row(placed)[rows]
        earned += placed
    return earned, rows


def _placed(batch: Batch) -> Iterator[Array]:
    """[T] float64 each: parts of the rows' rewards, at the tokens where they were earned."""
    if "turn_reward" in batch:
        yield batch["turn_reward"].astype(np.float64)
    if "process_reward" in batch:
        weights = np.repeat(batch["process_weight"].astype(np.float64), batch.lengths)
        yield np.nan_to_num(batch["process_reward"].astype(np.float64), nan=0.0) * weights


def _zscores(values: Array, group: Array, scale: Scale, world: World) -> Array:
    """`zscore_by_group` over the rows of all ranks, each of which has whole groups."""
    if scale != "batch":
        return zscore_by_group(values, group, scale=scale)
    known = values[~np.isnan(values)].astype(np.float64)
    count, total = _sums(world, len(known), known.sum())
    (squares,) = _sums(world, np.square(known - total / max(count, 1.0)).sum())
    std = np.sqrt(squares / max(count - 1.0, 1.0))
    return zscore_by_group(values, group, scale="none") / (std + STD_EPS)


def _scores(batch: Batch, rows: Array) -> Array:
    return batch["reward"][rows].astype(np.float64)


def _k3(log_ratio: Array) -> Array:
    away = np.clip(-log_ratio, -LARGEST_LOG, LARGEST_LOG)
    return np.expm1(away) - away


def _adapted(beta: float, kl: Array, world: World, target: float, horizon: int) -> float:
    """The coefficient after a batch: larger where the policy went further than wanted."""
    count, total = _sums(world, len(kl), kl.sum())
    error = np.clip(total / max(count, 1.0) / target - 1, -LARGEST_ERROR, LARGEST_ERROR)
    return beta * float(1 + error * count / horizon)


def _explained_variance(returns: Array, values: Array, world: World) -> float | None:
    """Which share of the returns' variance the values explain, over all ranks: 1 is all, 0 what a constant does. None
    if the returns do not vary."""
    count, total, missed = _sums(world, len(returns), returns.sum(), (returns - values).sum())
    if not count:
        return None
    spread = np.square(returns - total / count).sum()
    left = np.square(returns - values - missed / count).sum()
    spread, left = _sums(world, spread, left)
    return 1 - left / spread if spread > 0 else None


def _sums(world: World, *values: float) -> list[float]:
    """Of each value, the sum over all ranks."""
    return world.sum(torch.tensor([float(value) for value in values], dtype=torch.float64)).tolist()


def _mean(values: Array) -> Stat:
    return Stat(float(values.sum()), float(len(values)))


def _mean_over(rows: Array, values: Array) -> Stat:
    """A metric that is the mean over rows."""
    return Stat(float(values.sum()), float(rows.sum()))
