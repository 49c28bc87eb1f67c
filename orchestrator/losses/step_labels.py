"""Losses of process reward models: each step of an answer is right or wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.imports import F, torch
from actors.objective import Stat
from orchestrator.losses.declare import Loss
from orchestrator.losses.views import LabelledSteps

if TYPE_CHECKING:
    from torch import Tensor


def step_cross_entropy(steps: LabelledSteps) -> Loss:
    """[T]: `-log σ(z)` at the last token of a right step and `-log σ(-z)` at that of a wrong one, z the model's number
    there, so that `σ(z)` is the probability that the step is right. The same as the cross-entropy of two classes whose
    logits differ by z.

    Source: arXiv:2211.14275, section 2; arXiv:2312.08935, eq. 2.
    """
    signed = torch.where(steps.is_right, steps.scalars, -steps.scalars)
    return -F.logsigmoid(signed), _metrics(steps)


def _metrics(steps: LabelledSteps) -> dict[str, Stat]:
    """`accuracy`: of steps that are judged as labelled, right where the probability is above 1/2. `first_error`: of
    answers whose first step that is judged wrong is the first that is labelled so; or which have neither.
    `mean_right`, `mean_wrong`: the mean probability that a step is right, of right and of wrong ones."""
    judged_right, probability = steps.scalars.detach() > 0, steps.scalars.detach().sigmoid()
    agrees = (judged_right == steps.is_right).to(probability.dtype)
    found = _first(steps, ~judged_right) == _first(steps, ~steps.is_right)
    labelled = steps.counts > 0
    metrics = {
        "accuracy": steps.token_stat(agrees),
        "first_error": Stat((found & labelled).sum(), labelled.sum()),
    }
    for name, chosen in (("mean_right", steps.is_right), ("mean_wrong", ~steps.is_right)):
        chosen = chosen & steps.mask
        metrics[name] = Stat(torch.where(chosen, probability, 0).sum(), chosen.sum())
    return metrics


def _first(steps: LabelledSteps, wrong: Tensor) -> Tensor:
    """[B]: where the first labelled step of each row that is `wrong` [T] ends; the number of tokens if there is
    none."""
    place = torch.arange(len(wrong), device=wrong.device).masked_fill(~(wrong & steps.mask), len(wrong))
    start = torch.full((len(steps.micro),), len(wrong), dtype=place.dtype, device=place.device)
    return start.scatter_reduce(0, steps.micro.row_of_token, place, "amin")
