"""Losses over single completions that are labelled desirable or undesirable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actors.imports import F, torch
from actors.objective import Stat, World
from orchestrator.losses.declare import Loss, couples, is_on, reads
from orchestrator.losses.views import RefLabelled, joined, require

if TYPE_CHECKING:
    from torch import Tensor


def mean_kl(views: list[RefLabelled], world: World, state: dict[str, Any]) -> dict[str, Tensor]:
    """`max(0, mean of u)` of the whole batch. Over mismatched rows it estimates the policy's KL from the reference."""
    ratios = joined([view.log_ratios for view in views])
    total, count = world.sum(torch.stack([ratios.sum(), ratios.new_tensor(float(len(ratios)))]))
    return {"kl": (total / count.clamp(min=1)).clamp(min=0)}


@couples(mean_kl, over="mismatched")
def kto(rows: RefLabelled, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Loss:
    """[B]: `λ_D (1 - σ(β(u - z)))` for a desirable row, `λ_U (1 - σ(β(z - u)))` for an undesirable one.

    `z` is the KL estimate of `mean_kl` over the mismatched rows. Source: arXiv:2402.01306."""
    kl = rows.shared["kl"]
    values = _weighted(
        rows, 1 - torch.sigmoid(_signed(rows, beta * (rows.log_ratios - kl))), desirable_weight, undesirable_weight
    )
    return values, {"kl": Stat(kl), **_metrics(rows, beta)}


def apo_zero_unpaired(
    rows: RefLabelled, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Loss:
    """[B]: `λ_D (1 - σ(βu))` for a desirable row, `λ_U σ(βu)` for an undesirable one.

    Source: arXiv:2408.06266."""
    values = _weighted(
        rows, 1 - torch.sigmoid(_signed(rows, beta * rows.log_ratios)), desirable_weight, undesirable_weight
    )
    return values, _metrics(rows, beta)


def running_mean_reward(
    views: list[RefLabelled], world: World, state: dict[str, Any], *, beta: float
) -> dict[str, Tensor]:
    """The running mean of `βu` over all rows of all batches, the current one included. `state` holds it between
    steps."""
    rewards = beta * joined([view.log_ratios for view in views])
    total, count = world.sum(torch.stack([rewards.sum(), rewards.new_tensor(float(len(rewards)))]))
    seen = state.get("count", 0.0) + float(count)
    state["mean"] = (state.get("mean", 0.0) * state.get("count", 0.0) + float(total)) / max(seen, 1.0)
    state["count"] = seen
    return {"delta": rewards.new_tensor(state["mean"])}


@reads("weight", density_ratio=is_on)
@couples(running_mean_reward)
def bco(rows: RefLabelled, *, beta: float, density_ratio: bool = False) -> Loss:
    """[B]: `-log σ(±(βu - δ))`, plus for a desirable row, minus for an undesirable one; δ is the running mean of all
    rewards.

    With `density_ratio`, each undesirable row is multiplied by the column `weight`. Source: arXiv:2404.04656."""
    delta = rows.shared["delta"]
    values = -F.logsigmoid(_signed(rows, beta * rows.log_ratios - delta))
    if density_ratio:
        values = values * torch.where(rows.label, 1.0, require(rows.weight))
    return values, {"delta": Stat(delta), **_metrics(rows, beta)}


def _signed(rows: RefLabelled, values: Tensor) -> Tensor:
    return torch.where(rows.label, values, -values)


def _weighted(rows: RefLabelled, values: Tensor, desirable: float, undesirable: float) -> Tensor:
    return values * torch.where(rows.label, desirable, undesirable)


def _metrics(rows: RefLabelled, beta: float) -> dict[str, Stat]:
    """`chosen` are the desirable rows, `rejected` the others."""
    sides = {"chosen": rows.label, "rejected": ~rows.label}
    rewards, logps = beta * rows.log_ratios, rows.row_sums(rows.logps)
    named = {f"rewards/{side}": rows.row_stat(rewards, members) for side, members in sides.items()}
    return named | {f"logps/{side}": rows.row_stat(logps, members) for side, members in sides.items()}
