"""One run with a phase of three steps for every method that samples: one start of the processes for all of them.

Each phase begins with the policy as the phase before left it, and with a reference that is a copy of that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator.methods import METHODS, build
from orchestrator.reporting.metrics import METRICS_FILE, read
from tests.unit.tiny import tiny_model_folder

STEPS = 3
REWARD = """
def spread(completions, **columns):
    return [sum(place * ord(each) for place, each in enumerate(text, 1)) % 97 / 97 + 0.1 for text in completions]
"""

# options, and what tells the distance of a policy from its reference
METHODS_THAT_SAMPLE: dict[str, tuple[dict[str, Any], str]] = {
    "grpo": ({"beta": 0.1, "correction": "token_truncate"}, "kl"),
    "gfpo": ({"num_generations": 4, "num_remains_in_group": 2, "beta": 0.1, "correction": "token_mask"}, "kl"),
    "rloo": ({"correction": "sequence_truncate"}, "kl"),
    "reinforce_pp": ({"num_generations": 4, "correction": "token_truncate"}, "objective/kl"),
    "reinforce_pp_baseline": ({"num_generations": 4, "correction": "token_truncate"}, "kl"),
    "a2po": ({"num_value_samples": 2}, "objective/kl"),
    "ppo": ({"num_ppo_epochs": 1, "num_generations": 4}, "objective/kl"),
    "online_dpo": ({}, "objective/kl"),
    "nash_md": ({"mixture_coef": [0.5, 0.25]}, "objective/kl"),
    "xpo": ({"alpha": 1e-3}, "objective/kl"),
    "gkd": ({}, "loss"),
    "on_policy_distillation": ({}, "divergence"),
    "iw_opd": ({}, "reverse_kl"),
    "minillm": ({}, "divergence"),
}

CUT = {"top_k": 6, "top_p": 0.8}
CORRECTED = {"correction": "token_truncate", "correction_max": 1e6, "beta": 0.1}


@dataclass(frozen=True)
class Phase:
    method: str
    options: dict[str, Any]
    distance: str
    sampling: dict[str, Any] = field(default_factory=dict)
    ratio: bool = True  # whether policy and sampler have the same distribution


ONLINE: dict[str, Phase] = {
    **{name: Phase(name, *found) for name, found in METHODS_THAT_SAMPLE.items()},
    "cut": Phase("grpo", CORRECTED, "kl", {**CUT, "replay_truncation": True}),
    "cut_and_biased": Phase("grpo", CORRECTED, "kl", CUT, ratio=False),
}


def recipe(where: Path, engine: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The configuration of the run. `engine`: of every role that samples."""
    (where / "rewards.py").write_text(REWARD)
    rows = where / "prompts.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i}+{i}=", "completion": "{2 * i}"}}\n' for i in range(12)))
    phase = {
        "data": {"path": str(rows)},
        "train": {"steps": STEPS, "batch_size": 8, "learning_rate": 1e-3, "scheduler": "constant"},
    }
    folder = tiny_model_folder(where, hidden=128)
    return {
        "name": "t",
        "output": str(where),
        "model": {"path": str(folder)},
        "rewards": [{"fn": f"{where / 'rewards.py'}:spread"}],
        "phases": {
            name: {**phase, "method": of.method, "options": of.options, "sampling": {"max_tokens": 6, **of.sampling}}
            for name, of in ONLINE.items()
        },
        "roles": {
            **{name: dict(engine) for name in ("rollout", "reference_rollout", "mixture_rollout")},
            "teacher": {"model": str(folder)},
        },
        "logging": {"completions_every": None, "tensorboard": False},
        **changes,
    }


def assert_three_steps_of_each(folder: Path, tolerance: float) -> None:
    """Every method has learned something in three steps, each phase from a policy that is its own reference and its own
    sampler: at its first step the divergence is 0, and ratios are 1."""
    sampling = {name for name in METHODS if build(name, {}).generates}
    assert set(METHODS_THAT_SAMPLE) == sampling, "a method that samples has no phase here, or one that does not has"
    lines = [line for line in read(folder / METRICS_FILE) if any(key.endswith("loss") for key in line)]
    for name, phase in ONLINE.items():
        steps = [line for line in lines if line["phase"] == name]
        assert len(steps) == STEPS, name
        first, *others = steps
        norms = [value for line in steps for key, value in line.items() if key.endswith("grad_norm")]
        assert min(norms) > 0 and all(math.isfinite(value) for line in steps for value in numbers(line)), name
        moved = max(abs(line[phase.distance]) for line in others)
        if not build(phase.method, {}).teachers:  # which are the model that the run began with
            assert first[phase.distance] == pytest.approx(0, abs=tolerance), name
        assert moved > 10 * tolerance, f"{name}: the policy has not moved from its reference: this shows nothing"
        ratio = first.get("sampling/importance_sampling_ratio/mean", 1.0)
        assert (abs(ratio - 1) <= tolerance) is phase.ratio, f"{name}: {ratio}"
        assert first.get("staleness/max", 0.0) == 0.0


def numbers(line: dict[str, Any]) -> list[float]:
    return [value for value in line.values() if isinstance(value, float)]
