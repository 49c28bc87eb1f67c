"""A*-PO: the policy's log-ratio is fitted to the advantage under the best policy near the reference."""

from __future__ import annotations

from orchestrator.batches.regrouping import with_optimal_value
from orchestrator.losses.reduce import row_mean_of_token_means
from orchestrator.losses.regression import optimal_advantage
from orchestrator.methods.option_types import Count, Positive
from orchestrator.pipeline import Pipeline, Prompts, generate, infer, regroup, score, update


def a2po(
    *,
    num_value_samples: Count = 8,
    beta1: Positive = 0.5,
    beta2: Positive = 1e-3,
    filter_all_incorrect: bool = True,
    token_metrics: bool = False,
) -> Pipeline:
    """A*-PO: one sample of the policy, whose log-ratio is fitted to its reward beyond the prompt's optimal value.

    Source: arXiv:2505.20686."""
    return Pipeline(
        Prompts,
        generate("rollout", n=1),
        generate("reference_rollout", n=num_value_samples),
        score("reward"),
        regroup(with_optimal_value, rows=1, beta=beta1, drop_unsolved=filter_all_incorrect),
        infer("reference", into="ref_logps"),
        update("policy", optimal_advantage, reduce=row_mean_of_token_means, beta=beta2, token_metrics=token_metrics),
    )
