"""Preference losses that compare whole distributions of pairs (AOT): they sort, so they couple all pairs of a batch.

Sorting spans all micro-batches and ranks: a pass without gradient finds each value's partner, the value of equal rank
on the other side. Departure from TRL, which sorts within each micro-batch, so that the result depends on the split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actors.imports import torch
from actors.objective import World
from orchestrator.losses.declare import Loss, couples
from orchestrator.losses.pairwise import pair_metrics, pair_scores, smoothed_logistic
from orchestrator.losses.views import RefPairs, joined

if TYPE_CHECKING:
    from torch import Tensor


def differences_by_rank(
    views: list[RefPairs], world: World, state: dict[str, Any], *, ld_alpha: float | None
) -> dict[str, Tensor]:
    """For each pair's difference under the policy, the difference of equal rank under the reference."""
    policy = _gathered(world, [pair_scores(view, view.logps, ld_alpha).difference for view in views])
    reference = _gathered(world, [pair_scores(view, view.ref_logps, ld_alpha).difference for view in views])
    return _by_pair(world, views, partner=_equal_rank(policy, reference))


def ratios_by_rank(
    views: list[RefPairs], world: World, state: dict[str, Any], *, ld_alpha: float | None
) -> dict[str, Tensor]:
    """For each chosen log-ratio the rejected one of equal rank, and the reverse."""
    scores = [pair_scores(view, view.logps - view.ref_logps, ld_alpha) for view in views]
    chosen = _gathered(world, [score.chosen for score in scores])
    rejected = _gathered(world, [score.rejected for score in scores])
    return _by_pair(
        world, views, partner_of_chosen=_equal_rank(chosen, rejected), partner_of_rejected=_equal_rank(rejected, chosen)
    )


@couples(differences_by_rank)
def aot(pairs: RefPairs, *, beta: float, label_smoothing: float = 0.0, ld_alpha: float | None = None) -> Loss:
    """[P]: smoothed logistic of `β z`, z between the sorted differences of policy and reference.

    Source: arXiv:2406.05882 (paired)."""
    policy = pair_scores(pairs, pairs.logps, ld_alpha)
    values = smoothed_logistic(beta * (policy.difference - _partner(pairs, "partner")), label_smoothing)
    ratios = pair_scores(pairs, pairs.logps - pairs.ref_logps, ld_alpha)
    return values, pair_metrics(pairs, ratios, beta, token_metrics=False)


@couples(ratios_by_rank)
def aot_unpaired(pairs: RefPairs, *, beta: float, label_smoothing: float = 0.0, ld_alpha: float | None = None) -> Loss:
    """[P]: smoothed logistic of `β z`, z between the sorted log-ratios of chosen and rejected completions.

    A value's partner may belong to another micro-batch, so each side treats the other as a constant: the chosen side
    contributes the value and its gradient, the rejected side only its gradient.
    Source: arXiv:2406.05882 (unpaired)."""
    ratios = pair_scores(pairs, pairs.logps - pairs.ref_logps, ld_alpha)
    chosen_side = beta * (ratios.chosen - _partner(pairs, "partner_of_chosen"))
    rejected_side = beta * (_partner(pairs, "partner_of_rejected") - ratios.rejected)
    gradient_only = smoothed_logistic(rejected_side, label_smoothing)
    values = smoothed_logistic(chosen_side, label_smoothing) + gradient_only - gradient_only.detach()
    return values, pair_metrics(pairs, ratios, beta, token_metrics=False)


def _gathered(world: World, parts: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    return world.gather(joined(parts, dtype))


def _equal_rank(values: Tensor, others: Tensor) -> Tensor:
    """[N]: for each value, the element of `others` with the same rank."""
    ranks = values.argsort(stable=True).argsort(stable=True)
    return others.sort().values[ranks]


def _by_pair(world: World, views: list[RefPairs], **columns: Tensor) -> dict[str, Tensor]:
    """Columns sorted by the pairs' group numbers, with those numbers, so that a micro-batch finds its own entries."""
    groups = _gathered(world, [view.group[view.sides[0]] for view in views], torch.int64)
    order = groups.argsort()
    return {"groups": groups[order], **{name: values[order] for name, values in columns.items()}}


def _partner(pairs: RefPairs, name: str) -> Tensor:
    mine = pairs.group[pairs.sides[0]]
    return pairs.shared[name][torch.searchsorted(pairs.shared["groups"], mine)]
