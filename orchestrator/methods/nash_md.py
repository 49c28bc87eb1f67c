"""Nash mirror descent: the policy plays against a mixture of itself and the reference."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestrator.batches.regrouping import penalise_missing_eos, preference_over_opponent
from orchestrator.losses.against_opponent import preferred_to_opponent
from orchestrator.losses.reduce import row_mean_of_token_sums
from orchestrator.methods.option_types import Positive, Share
from orchestrator.pipeline import Pipeline, Prompts, generate, infer, regroup, score, update, when


def nash_md(
    *,
    mixture_coef: Share | Annotated[tuple[Share, ...], Field(min_length=1)] = 0.5,
    beta: Positive = 0.1,
    missing_eos_penalty: Positive | None = None,
    token_metrics: bool = False,
) -> Pipeline:
    """Nash learning from preferences: a sample of the policy against one of a mixture of policy and reference.

    Source: arXiv:2312.00886 (Nash-MD)."""
    return Pipeline(
        Prompts,
        generate("rollout", n=1),
        generate("mixture_rollout", n=1, mixture=mixture_coef),
        score("reward", win_rates=True),
        *when(missing_eos_penalty, regroup(penalise_missing_eos, penalty=missing_eos_penalty)),
        regroup(preference_over_opponent, rows=1),
        infer("reference", into="ref_logps"),
        update("policy", preferred_to_opponent, reduce=row_mean_of_token_sums, beta=beta, token_metrics=token_metrics),
        temperature=1.0,  # the preference is the model's own, however its samples were drawn
    )
