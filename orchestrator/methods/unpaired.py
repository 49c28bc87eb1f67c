"""Methods for completions that are labelled one by one: KTO and BCO."""

from __future__ import annotations

from typing import Literal

from actors.errors import ConfigError
from orchestrator.losses.reduce import item_mean
from orchestrator.losses.unpaired import apo_zero_unpaired as apo_zero_loss
from orchestrator.losses.unpaired import bco as bco_loss
from orchestrator.losses.unpaired import kto as kto_loss
from orchestrator.methods.option_types import NotNegative, Positive
from orchestrator.methods.reference_sync import MIXUP_ALPHA, SYNC_STEPS, Share, Steps, reference_sync
from orchestrator.pipeline import Labelled, MismatchedLabelled, Pipeline, WeightedLabelled, infer, update


def kto(
    *,
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto",
    beta: Positive = 0.1,
    desirable_weight: NotNegative = 1.0,
    undesirable_weight: NotNegative = 1.0,
    sync_ref_model: bool = False,
    ref_model_mixup_alpha: Share = MIXUP_ALPHA,
    ref_model_sync_steps: Steps = SYNC_STEPS,
    precompute_ref_log_probs: bool | None = None,
) -> Pipeline:
    """Kahneman-Tversky optimisation: gains and losses against how far the policy has moved.

    `loss_type=kto` makes mismatched rows of each batch, which nobody can compute beforehand. Source: arXiv:2402.01306.
    """
    if not desirable_weight and not undesirable_weight:
        raise ConfigError(
            "options.desirable_weight and options.undesirable_weight are both 0: nothing is learned; give one of them "
            "a weight above 0"
        )
    data, loss = {
        "kto": (MismatchedLabelled, kto_loss),
        "apo_zero_unpaired": (Labelled, apo_zero_loss),
    }[loss_type]
    sync = reference_sync(sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps)
    return Pipeline(
        data,
        infer("reference", into="ref_logps", precomputed=precompute_ref_log_probs),
        update(
            "policy",
            loss,
            reduce=item_mean,
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
        ),
        *sync,
    )


def bco(
    *,
    beta: Positive = 0.1,
    density_ratio: bool = False,
    sync_ref_model: bool = False,
    ref_model_mixup_alpha: Share = MIXUP_ALPHA,
    ref_model_sync_steps: Steps = SYNC_STEPS,
    precompute_ref_log_probs: bool | None = None,
) -> Pipeline:
    """Binary classifier optimisation: a classifier of desirable completions, its threshold the mean reward so far.

    `density_ratio` weighs undesirable rows by how likely their prompts are among the desirable ones.
    Source: arXiv:2404.04656."""
    sync = reference_sync(sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps)
    return Pipeline(
        WeightedLabelled if density_ratio else Labelled,
        infer("reference", into="ref_logps", precomputed=precompute_ref_log_probs),
        update("policy", bco_loss, reduce=item_mean, beta=beta, density_ratio=density_ratio),
        *sync,
    )
