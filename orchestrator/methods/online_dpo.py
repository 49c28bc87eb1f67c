"""Direct preference optimisation on pairs that are made of the policy's own samples."""

from __future__ import annotations

from typing import Literal

from orchestrator.batches.regrouping import Ties, best_and_worst, penalise_missing_eos
from orchestrator.losses.pairwise import Contrast, ipo_of_sums, sigmoid
from orchestrator.losses.reduce import item_mean
from orchestrator.losses.sampled_pairs import against_reference_of_samples
from orchestrator.methods.option_types import Positive, Several
from orchestrator.pipeline import Pipeline, Prompts, generate, infer, regroup, score, update, when

CONTRASTS: dict[str, Contrast] = {"sigmoid": sigmoid, "ipo": ipo_of_sums}


def online_dpo(
    *,
    num_generations: Several = 2,
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid",
    beta: Positive = 0.1,
    ties: Ties = "drop",
    missing_eos_penalty: Positive | None = None,
    token_metrics: bool = False,
) -> Pipeline:
    """DPO on the policy's own samples: of each prompt's, the best against the worst. Source: arXiv:2402.04792."""
    return Pipeline(
        Prompts,
        generate("rollout", n=num_generations),
        score("reward"),
        *when(missing_eos_penalty, regroup(penalise_missing_eos, penalty=missing_eos_penalty)),
        regroup(best_and_worst, rows=2, ties=ties),
        infer("reference", into="ref_logps"),
        update(
            "policy",
            against_reference_of_samples,
            reduce=item_mean,
            contrast=CONTRASTS[loss_type],
            beta=beta,
            token_metrics=token_metrics,
        ),
        temperature=1.0,  # the preference is the model's own, however its samples were drawn
    )
