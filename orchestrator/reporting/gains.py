"""The gain of each phase of a run, from its metrics: held-out scores before and after, or else training metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.reporting.account import PhaseCost
from orchestrator.result import Gain

MEASURES = {  # metric -> its label, the most informative one first
    "eval_reward": "held-out score",
    "eval_rewards/accuracies": "held-out accuracy",
    "eval_accuracy": "held-out accuracy",
    "eval_loss": "held-out loss",
    "reward": "reward in training",
    "loss": "loss in training",
}


def phase_gains(lines: Sequence[Mapping[str, Any]], costs: Mapping[str, PhaseCost]) -> tuple[Gain, ...]:
    """`lines`: of the metrics file. A phase that was not evaluated at its start begins with the final score of the
    previous phase."""
    found: list[Gain] = []
    score: float | None = None
    for phase in dict.fromkeys(str(line["phase"]) for line in lines):
        own = [line for line in lines if line["phase"] == phase]
        name, values = _measured(own)
        first = score if name == "eval_reward" and score is not None else values[0] if len(values) > 1 else None
        if name == "eval_reward":
            score = values[-1]
        cost = costs.get(phase, PhaseCost())
        found.append(
            Gain(phase, cost.steps, cost.tokens, MEASURES.get(name, ""), first, values[-1] if values else None)
        )
    return tuple(found)


def _measured(lines: Sequence[Mapping[str, Any]]) -> tuple[str, list[float]]:
    for name in MEASURES:
        values = [float(line[name]) for line in lines if line.get(name) is not None]
        if values:
            return name, values
    return "", []
