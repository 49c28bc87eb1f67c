"""Runs with a phase of three steps for every method that samples: one start of the processes for all of them; and for
some of them another one of episodes.

Each phase begins with the policy as the phase before left it, and with a reference that is a copy of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    texts = [
        text if isinstance(text, str) else "".join(said["content"] for said in text if said["role"] == "assistant")
        for text in completions
    ]
    return [sum(place * ord(each) for place, each in enumerate(text, 1)) % 97 / 97 + 0.1 for text in texts]
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
    "sppo": ({"num_generations": 4}, "objective/kl"),
    "gkd": ({}, "loss"),
    "on_policy_distillation": ({}, "divergence"),
    "iw_opd": ({}, "reverse_kl"),
    "minillm": ({}, "divergence"),
    "gold": ({"teacher_top_k": 8, "shared_weight": 0.5}, "divergence"),
    "sdft": ({"teacher_template": "{prompt} {completion}", "teacher_top_k": 8}, "divergence"),
    "sdpo": ({"num_generations": 4, "success_threshold": 0.6, "teacher_top_k": 8}, "divergence"),
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
    episodes: bool = False


ONLINE: dict[str, Phase] = {
    **{name: Phase(name, *found) for name, found in METHODS_THAT_SAMPLE.items()},
    "cut": Phase("grpo", CORRECTED, "kl", {**CUT, "replay_truncation": True}),
    "cut_and_biased": Phase("grpo", CORRECTED, "kl", CUT, ratio=False),
}
EPISODES: dict[str, Phase] = {  # of whole rows, of returns, with a critic, of pairs and two models
    "grpo_episodes": Phase("grpo", {"num_generations": 4, **METHODS_THAT_SAMPLE["grpo"][0]}, "kl", episodes=True),
    **{
        f"{name}_episodes": Phase(name, *METHODS_THAT_SAMPLE[name], episodes=True)
        for name in ("reinforce_pp", "ppo", "nash_md")
    },
}
GAME = """
class Game:
    def __init__(self, turns):
        self.turns = turns

    def reset(self, row):
        self.turn = 0
        return [{"role": "user", "content": "say " + row["completion"]}]

    def step(self, message):
        self.turn += 1
        earned = sum(place * ord(each) for place, each in enumerate(message["content"], 1)) % 97 / 97
        return [{"role": "user", "content": "more"}], earned, self.turn == self.turns
"""
TEMPLATE = """{% for m in messages %}
{{ m.role }}: {{ m.content }}<eos>
{% endfor %}
{% if add_generation_prompt %}assistant: {% endif %}"""


def recipe(where: Path, engine: dict[str, Any], phases: Mapping[str, Phase] = ONLINE, **changes: Any) -> dict[str, Any]:
    """The configuration of the run. `engine`: of every role that samples."""
    (where / "rewards.py").write_text(REWARD)
    rows = where / "prompts.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i}+{i}=", "completion": "{2 * i}"}}\n' for i in range(12)))
    phase = {
        "data": {"path": str(rows)},
        "train": {"steps": STEPS, "batch_size": 8, "learning_rate": 1e-3, "scheduler": "constant"},
    }
    (where / "game.py").write_text(GAME)
    (where / "template.jinja").write_text(TEMPLATE)
    talking = {"environment": f"{where / 'game.py'}:Game", "options": {"turns": 2}}
    several = {"max_tokens": 160, "stop_token_ids": list(range(2, 64, 4))}  # a turn is about four tokens
    folder = tiny_model_folder(where, hidden=128)
    return {
        "name": "t",
        "output": str(where),
        "model": {"path": str(folder), "chat_template": str(where / "template.jinja")},
        "rewards": [{"fn": f"{where / 'rewards.py'}:spread"}],
        "phases": {
            name: {
                **phase,
                "method": of.method,
                "options": of.options,
                "train": {**phase["train"], "batch_size": 4 if of.episodes else 8},
                "sampling": {**(several if of.episodes else {"max_tokens": 6}), **of.sampling},
                "episode": talking if of.episodes else None,
            }
            for name, of in phases.items()
        },
        "roles": {
            **{name: dict(engine) for name in ("rollout", "reference_rollout", "mixture_rollout")},
            "teacher": {"model": str(folder)},
        },
        "logging": {"completions_every": None, "trackers": [], "curves": False},
        **changes,
    }


def assert_three_steps_of_each(folder: Path, tolerance: float, phases: Mapping[str, Phase] = ONLINE) -> None:
    """Every method has learned something in three steps, each phase from a policy that is its own reference and its own
    sampler: at its first step the divergence is 0, and ratios are 1."""
    sampling = {name for name in METHODS if build(name, {}).generates and build(name, {}).trained}
    assert set(METHODS_THAT_SAMPLE) == sampling, "a method that samples has no phase here, or one that does not has"
    lines = [line for line in read(folder / METRICS_FILE) if any(key.endswith("loss") for key in line)]
    for name, phase in phases.items():
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
        if phase.episodes:
            assert first["episodes/mean_turns"] == 2 and 0 < first["episodes/model_token_share"] < 0.5, name
            assert first["rewards/environment/mean"] > 0, name


def numbers(line: dict[str, Any]) -> list[float]:
    return [value for value in line.values() if isinstance(value, float)]
