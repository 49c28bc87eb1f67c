"""Losses of reward models: the preferred completion should have the higher score."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.imports import F
from actors.objective import Stat
from orchestrator.losses.declare import Loss, is_on, reads
from orchestrator.losses.views import ScoredPairs, require

if TYPE_CHECKING:
    from torch import Tensor


@reads("margin", use_margin=is_on)
def bradley_terry(pairs: ScoredPairs, *, use_margin: bool = False, centering: float = 0.0) -> Loss:
    """[P]: `-log σ(r_w - r_l - m) + η (r_w + r_l)²`, m the pair's margin if `use_margin`, η the `centering`, which
    keeps scores near 0: the first term is invariant to a constant added to all scores.

    Source: Bradley and Terry, 1952; arXiv:2203.02155, eq. 1; margin: arXiv:2307.09288, eq. 2; centering:
    arXiv:2312.09244, eq. 2.
    """
    chosen, rejected = pairs.split(pairs.scores)
    margin = pairs.split(require(pairs.margin))[0] if use_margin else 0.0
    values = -F.logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected).square()
    return values, _metrics(pairs, chosen, rejected)


def _metrics(pairs: ScoredPairs, chosen: Tensor, rejected: Tensor) -> dict[str, Stat]:
    """`accuracy` is the fraction of pairs in the right order; equal scores count as wrong."""
    scores = pairs.scores.detach()
    return {
        "accuracy": pairs.pair_stat((chosen > rejected).to(chosen.dtype)),
        "margin": pairs.pair_stat(chosen - rejected),
        "min_reward": Stat(scores.min(), combine="min"),
        "mean_reward": Stat(scores.sum(), len(scores)),
        "max_reward": Stat(scores.max(), combine="max"),
    }
