"""Exploratory preference optimisation: online DPO that is rewarded for leaving the reference."""

from __future__ import annotations

from typing import Literal

from orchestrator.batches.regrouping import Ties, best_and_worst, penalise_missing_eos
from orchestrator.losses.reduce import item_mean
from orchestrator.losses.sampled_pairs import with_exploration_bonus
from orchestrator.methods.online_dpo import CONTRASTS
from orchestrator.methods.option_types import Positive
from orchestrator.pipeline import Pipeline, Prompts, generate, infer, regroup, score, update, when


def xpo(
    *,
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid",
    beta: Positive = 0.1,
    alpha: Positive = 1e-5,
    ties: Ties = "drop",
    missing_eos_penalty: Positive | None = None,
    token_metrics: bool = False,
) -> Pipeline:
    """Online DPO on one sample of the policy and one of the reference, with a bonus for leaving the reference.

    Source: arXiv:2405.21046, algorithm 1."""
    return Pipeline(
        Prompts,
        generate("rollout", n=1),
        generate("reference_rollout", n=1),
        score("reward"),
        *when(missing_eos_penalty, regroup(penalise_missing_eos, penalty=missing_eos_penalty)),
        regroup(best_and_worst, rows=2, ties=ties),
        infer("reference", into="ref_logps"),
        update(
            "policy",
            with_exploration_bonus,
            reduce=item_mean,
            contrast=CONTRASTS[loss_type],
            beta=beta,
            alpha=alpha,
            token_metrics=token_metrics,
        ),
        temperature=1.0,  # as of online DPO
    )
