"""Self-play preference optimisation: the policy plays against itself as it was when the phase began."""

from __future__ import annotations

from typing import Literal

from orchestrator.batches.regrouping import Ties, most_and_least_preferred
from orchestrator.losses.reduce import row_mean_of_token_means
from orchestrator.losses.regression import preference_beyond_half
from orchestrator.methods.option_types import Positive, Several
from orchestrator.pipeline import Pipeline, Prompts, generate, infer, regroup, score, update


def sppo(
    *,
    num_generations: Several = 5,
    win_rates: Literal["soft", "hard"] = "soft",
    beta: Positive = 1e-3,
    ties: Ties = "drop",
    token_metrics: bool = False,
) -> Pipeline:
    """SPPO: fit the log-ratio of the reference's own best and worst samples to how often they are preferred.

    Source: arXiv:2405.00675."""
    return Pipeline(
        Prompts,
        generate("reference_rollout", n=num_generations),
        score("reward", win_rates=True),
        regroup(most_and_least_preferred, rows=2, hard=win_rates == "hard", ties=ties),
        infer("reference", into="ref_logps"),
        update(
            "policy", preference_beyond_half, reduce=row_mean_of_token_means, beta=beta, token_metrics=token_metrics
        ),
        temperature=1.0,  # the preference is the model's own, however its samples were drawn
    )
