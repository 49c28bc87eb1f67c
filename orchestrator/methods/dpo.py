"""Direct preference optimisation, its losses and divergences."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from actors.errors import ConfigError
from orchestrator.losses.declare import LossFunction, Sum, Term
from orchestrator.losses.divergences import DivergenceName, divergence
from orchestrator.losses.likelihood import chosen_nll
from orchestrator.losses.pairwise import CONTRASTS, Contrast, against_reference
from orchestrator.losses.reduce import item_mean, token_mean
from orchestrator.losses.transport import aot, aot_unpaired
from orchestrator.methods.option_types import NotNegative, Positive, Smoothing
from orchestrator.methods.reference_sync import MIXUP_ALPHA, SYNC_STEPS, Share, Steps, reference_sync
from orchestrator.pipeline import Pairs, Pipeline, infer, update, when
from orchestrator.plugins import Plugin, is_plugin, load

LossName = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]

TRANSPORT: dict[str, LossFunction] = {"aot": aot, "aot_unpaired": aot_unpaired}
ONLY_REVERSE_KL = frozenset({"nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", *TRANSPORT})


def dpo(
    *,
    loss_type: Plugin | LossName | tuple[Plugin | LossName, ...] = "sigmoid",
    loss_weights: tuple[NotNegative, ...] | None = None,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
    f_divergence_type: DivergenceName = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None,
    use_weighting: bool = False,
    discopop_tau: Positive = 0.05,
    token_metrics: bool = False,
    sync_ref_model: bool = False,
    ref_model_mixup_alpha: Share = MIXUP_ALPHA,
    ref_model_sync_steps: Steps = SYNC_STEPS,
    precompute_ref_log_probs: bool | None = None,
) -> Pipeline:
    """Direct preference optimisation: the policy is its own reward model. Source: arXiv:2305.18290, eq. 7."""
    names = (loss_type,) if isinstance(loss_type, str) else loss_type
    weights = (1.0,) * len(names) if loss_weights is None else loss_weights
    _check(names, weights, label_smoothing, f_divergence_type, use_weighting)
    against = {name for name, weight in zip(names, weights, strict=True) if weight} != {"sft"}
    shared: dict[str, Any] = {
        "beta": beta,
        "divergence": divergence(f_divergence_type, f_alpha_divergence_coef),
        "ld_alpha": ld_alpha,
        "use_weighting": use_weighting,
        "token_metrics": token_metrics,
    }
    extra = {"label_smoothing": label_smoothing, "discopop_tau": discopop_tau}
    terms = (_term(name, weight, shared, extra) for name, weight in zip(names, weights, strict=True))
    return Pipeline(
        Pairs,
        *when(against, infer("reference", into="ref_logps", precomputed=precompute_ref_log_probs)),
        update("policy", Sum(*terms)),
        *when(against, *reference_sync(sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps)),
    )


def _term(name: str, weight: float, shared: dict[str, Any], extra: dict[str, Any]) -> Term:
    if name == "sft":
        return Term(chosen_nll, token_mean, weight)
    if name in TRANSPORT:
        return Term(TRANSPORT[name], item_mean, weight, _named({**shared, **extra}, TRANSPORT[name]))
    return Term(against_reference, item_mean, weight, {**shared, "contrast": bound_contrast(name, extra)})


def bound_contrast(name: str, options: dict[str, Any]) -> Contrast:
    """A contrast by name, or of a user's file, with those of the options that it takes."""
    contrast = load(name, "options.loss_type") if is_plugin(name) else CONTRASTS[name]
    return partial(contrast, **_named(options, contrast))


def _named(options: dict[str, Any], function: Any) -> dict[str, Any]:
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


def _check(
    names: tuple[str, ...], weights: tuple[float, ...], smoothing: float, divergence_name: str, use_weighting: bool
) -> None:
    """Raises ConfigError for options that do not go together."""
    if len(names) != len(weights) or not names:
        raise ConfigError(f"options.loss_weights has {len(weights)} entries for {len(names)} entries of loss_type")
    if not any(weights):
        raise ConfigError("options.loss_weights are all 0: nothing is learned; give one loss a weight above 0")
    if not smoothing and "exo_pair" in names:
        raise ConfigError("options.loss_type=exo_pair needs options.label_smoothing > 0 (1e-3, say)")
    if divergence_name != "reverse_kl" and (wrong := ONLY_REVERSE_KL & set(names)):
        raise ConfigError(f"options.f_divergence_type={divergence_name} is not defined for loss_type {_some(wrong)}")
    if use_weighting and (wrong := {"sft", *TRANSPORT} & set(names)):
        raise ConfigError(f"options.use_weighting weighs pairs, which loss_type {_some(wrong)} does not have")


def _some(names: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(names))
